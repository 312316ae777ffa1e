"""Foundations for all other parts of the package: batch types, errors, randomness, fault tolerance, files."""
