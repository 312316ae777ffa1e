"""Generates completions on a vLLM server."""
