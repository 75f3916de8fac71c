"""Fine-tuning: one GPU, one budget, nothing lost.

finetune     the step: files, budget, records            trainer      optimizer steps, their state
rows         tokens, and which rows a step sees          attention    rows end to end, kept apart
model        base model with adapter                     checkpoint   complete or absent
ledger       seconds of the budget over all attempts      device       the one GPU: capped, named, metered
command      the step with a team's own program           handover     the adapter into the entry's folder
"""
