"""Numeric kernels: one folder an operation, several implementations each, torch only.

An operation's `__init__` states its contract (formula, shapes, types, error bound, paper), its
`reference.py` is the plain formula, the other files are faster ways to the same numbers, and
`cases.py` lists the shapes and tolerances that hold for all of them. `dispatch` chooses and keeps
note of what ran.
"""
