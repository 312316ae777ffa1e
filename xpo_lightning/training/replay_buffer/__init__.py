"""Pairs of earlier batches, for later updates."""
