"""Fine-tuning on one GPU, inside one budget.

step         what every training has in common           ledger       seconds of the budget over all attempts
finetune     Palio's own trainer                         command      a team's own program
trainer      optimizer steps, their state                rows         tokens, and which rows a step sees
attention    rows end to end, kept apart                 model        base model with adapter
batching     end to end or padded: checked at the start
loss         cross-entropy over a large vocabulary
checkpoint   complete or absent                          device       the one GPU: capped, named, metered
"""
