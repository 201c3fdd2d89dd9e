"""HTTP for monitoring: /metrics, /health, /livez and /readyz."""
