"""How good the compressed artefact still is: the very artefact whose speed was measured.

    likelihood   how well it predicts a text (perplexity, bits per byte)
    fidelity     how far its predictions are from the uncompressed baseline's (KL, top-1)
    greedy       whether its greedy continuations are the baseline's
    long         whether it can still use what was said long ago (tasks in the style of RULER)
    rolling      lm-evaluation-harness' word and byte perplexity, to meet published numbers

`protocol` decides which tokens are scored, `walk` feeds them through the cache, and `evaluate`
puts the parts together.
"""
