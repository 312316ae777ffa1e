"""What policies learn: accuracy on held-out problems."""
