"""4. Routing: the route table, and MX resolution."""
