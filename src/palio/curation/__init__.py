"""Sources to training data: read, normalise, clean, select, and account for every row."""
