"""Authentication: who a client is. Login attempts, their back ends and their limits, and the identity that they lead to."""
