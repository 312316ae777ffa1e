"""Tiny policy, reward model and prompts that ship with the package; `tools/quickstart_assets` builds them."""
