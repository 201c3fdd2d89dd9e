"""HTTP for monitoring: /metrics and /health."""
