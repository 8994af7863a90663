"""All that touches transformers: sources, loading, caches, attention, decode steps.

Nothing outside this package imports transformers, so a change of its internals is absorbed here.
"""
