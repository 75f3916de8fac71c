"""Palio runs a whole LLM fine-tuning competition: entries in, a leaderboard that can be trusted out."""

__version__ = "0.1.0"
