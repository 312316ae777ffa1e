"""Measurements of this package, beside TRL's where there is one; run them from the repository's root."""
