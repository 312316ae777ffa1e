"""Seconds of an optimizer step on a CPU, beside TRL's, and the least that they could be."""
