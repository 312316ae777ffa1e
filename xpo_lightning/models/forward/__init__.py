"""Calls of language models: what each allows, prompts computed once, the vocabulary head, what a CPU needs."""
