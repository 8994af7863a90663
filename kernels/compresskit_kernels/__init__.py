"""Numeric kernels: one folder an operation, several implementations each, torch only.

An operation's `__init__` states its contract (formula, shapes, types, error bound, paper), its
`cases.py` lists the shapes and tolerances that hold for every implementation. `dequantise` is the
plain formula of all of them, the other files of a folder are faster ways to the same numbers.
`dispatch` chooses and keeps note of what ran; `probe` asks which ones pay on this machine.
"""
