"""Forward passes of language models: probing of fast paths, prompt sharing, the vocabulary head, CPU kernels."""
