"""Reads what the runs measured; see `run.py`."""
