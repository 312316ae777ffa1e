"""Checkpoints of a run: writing them crash-safe, finding the one to resume from, and a metrics file that continues."""
