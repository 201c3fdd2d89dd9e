"""4. Where it goes: the route table, and MX resolution."""
