"""A reward that verifies answers in a process of its own."""
