"""The memory of steps on a CPU, beside the estimate."""
