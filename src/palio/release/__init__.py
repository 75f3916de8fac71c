"""A finished competition as a folder that somebody else can score again: gather, check, describe."""
