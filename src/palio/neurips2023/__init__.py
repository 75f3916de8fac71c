"""The LLM Efficiency Challenge of NeurIPS 2023: its published tables, recomputed, analyzed and drawn.

download     where the published tables are, and their hashes
tables       the tables recomputed cell by cell, and read as Palio leaderboards
figure_data  the data of the paper's figures
figures      the paper's figures, drawn
report       one report on all rounds

The win-rate conventions of 2023 are in `palio.scoring.conventions`, so any leaderboard can be scored with
them. They are derived from these tables: the open round follows `helm2023` (the alphabet breaks ties), the
hidden round `hidden2023`, and the final `final2023`; `tables` checks every cell of all three.
"""
