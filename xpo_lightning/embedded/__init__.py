"""Tiny policy, reward model and prompts that ship with the package, and the code that builds them."""
