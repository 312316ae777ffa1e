"""From names to models, tokenizers and files."""
