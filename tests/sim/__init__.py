"""A deterministic simulator of two workers: the real queue, dispatcher, pools, decisions, policies and DNS cache on virtual time.

`python -m tests.sim SEED [--trace]` runs one seed.
"""
