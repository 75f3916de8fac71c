"""From base model and adapter to a package: a plain model folder with its manifest and model card."""
