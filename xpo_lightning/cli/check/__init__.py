"""The parts of `xpo check`: what is looked at, what is measured, and what is said of it."""
