"""Packages: a plain model folder made from base model and adapter, with its manifest and model card."""
