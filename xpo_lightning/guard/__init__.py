"""Stops a run before harm is done, on all processes together."""
