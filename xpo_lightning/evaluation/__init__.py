"""Compares two policies on the same prompts, with a confidence interval of the win rate."""
