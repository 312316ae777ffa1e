"""A run's folder: whole checkpoints, which of them is meant, and a metrics file that a resumed run goes on with."""
