"""The memory of a run, worked out from the shapes of its models."""
