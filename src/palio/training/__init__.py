"""Fine-tuning: one GPU, one budget, nothing lost.

step         the step around whatever trains             ledger       seconds of the budget over all attempts
finetune     Palio's own trainer in it                   command      a team's own program in it
trainer      optimizer steps, their state                rows         tokens, and which rows a step sees
attention    rows end to end, kept apart                 model        base model with adapter
checkpoint   complete or absent                          device       the one GPU: capped, named, metered
"""
