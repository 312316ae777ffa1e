"""Runs that are over: their configs, and their policies, ready to write."""
