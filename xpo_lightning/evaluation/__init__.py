"""Two policies on the same prompts: who writes the better completions, and how sure that is."""
