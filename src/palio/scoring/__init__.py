"""From HELM's statistics to a leaderboard and its uncertainty: pure functions with I/O at the edges.

columns      config + tidy metrics of one entry and stage -> cells, each a value or a state
conventions  a column of values -> win rates; named and versioned
formula      win rates -> scenario means -> stage scores -> final scores -> ranks
leaderboard  all entries of a track -> Leaderboard, and why some are not on it
tables       a leaderboard as CSV, Parquet, Markdown, LaTeX, and on the terminal
pool         a leaderboard's entries as arrays
uncertainty  intervals of scores and ranks, bootstrap or parametric
training_noise     how much they owe to the seed of the training
selection    the luck of whoever is first
decision     who gets the prizes, and what would separate entries that cannot be told apart
decision_document  the same to read
robustness   sensitivity of the ranking to pool, scenarios, and scoring rule
overfitting  open against closed, and contamination
analysis     all of the above for one track -> Analysis
versions     a new leaderboard from stored results, and why ranks differ between two
"""
