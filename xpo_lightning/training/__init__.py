"""The training step: collected pairs, the update plan, gradients, the optimizer, metrics, the replay buffer."""
