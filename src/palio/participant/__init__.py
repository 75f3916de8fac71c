"""What a team does on its own machine: make an entry, try the whole of it, see what to expect."""
