"""One entry, one stage: serve the package, run HELM on it, read what HELM measured into tidy tables."""
