"""What one team may see of its entry, as a page and a zip to send: nobody has to ask why an entry failed.

gathering  results, logs and scores of an entry -> `Feedback`
writing    `Feedback` -> <out>/<entry>.html and <out>/<entry>.zip

Of the closed stage a team sees its scores, as everybody does, and how it ended; no log, record or table of
it, and not how many of its questions are in the training data: a team that asks often could find them out
that way. Before anything is handed out, it is searched for texts of the closed stage and for credentials.
"""
