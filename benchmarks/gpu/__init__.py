"""A step's time, tokens and memory on a CUDA device."""
