"""The replay buffer: keeps pairs of earlier batches for later updates."""
