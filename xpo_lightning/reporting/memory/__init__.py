"""Estimates the memory of a run from the shapes of its models."""
