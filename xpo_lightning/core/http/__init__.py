"""The HTTP client of remote rewards, judges and the vLLM server."""
