"""5. It leaves: sites with their pools, sessions over reused connections, outcomes."""
