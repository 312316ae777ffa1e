"""A run as people see it: its files are found and read, its curves drawn, and a page written of it."""
