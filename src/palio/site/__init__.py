"""A static site of a competition for any web server, also while it runs: `palio publish-site DIR`.

history    what was published before, and what changed since, in words
building   results and leaderboards -> pages, answers of the open stage, downloads

Of the closed stage the site has scores, how each entry ended and how many questions were asked; not how many
of them are in a team's data, which a team that asks often could use to find them out.
"""
