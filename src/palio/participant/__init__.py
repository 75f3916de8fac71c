"""A team's own machine: make an entry, rehearse it, see what to expect."""
