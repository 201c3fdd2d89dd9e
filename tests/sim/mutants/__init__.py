"""Defects that the simulator has to find: each patch here brings one back that relaymta had.

`python -m tests.sim.mutants [NAME ...]` applies each to a copy of the tree and runs seeds until one fails.
"""
