"""The same pairs through TRL's loop and through ours: losses and gradients, no time."""
