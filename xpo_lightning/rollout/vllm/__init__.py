"""Completions written by a vLLM server."""
