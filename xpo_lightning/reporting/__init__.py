"""Reports about a run: finds and reads its files, draws its curves, and writes an HTML page and a model card."""
