"""The operator over HTTP: /metrics and /health."""
