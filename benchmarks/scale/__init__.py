"""The arithmetic for sizes that do not fit here, and the tables of docs/scale.md."""
