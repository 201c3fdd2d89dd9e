"""5. Delivery: sites and their pools, sessions over reused connections, outcomes."""
