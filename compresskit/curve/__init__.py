"""Cost curves: what a decode step takes and a cache holds, at every length of the context.

    fill      a cache of N tokens without a prefill: random keys and values through the layers' own doors
    measure   decode steps of all rows in shuffled turns, and bytes held
    document  verdicts against the dense cache, break-even, batch in a memory

A prefill of 32k tokens takes minutes on a CPU and says nothing about decoding; attention over random
keys costs what attention over real ones does. What is measured here is cost, never quality.
"""
