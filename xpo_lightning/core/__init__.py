"""What every other part of the package may use: batch types, errors, randomness, fault tolerance, files."""
