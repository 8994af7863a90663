"""Is a decode loop lossless? Ask the loop itself, from outside.

    rule      the acceptance rule's algebra, and every branch of a short text, without any randomness
    greedy    the tokens of plain decoding, on many prompts
    stops     a stop token or the length limit inside a block: the answer ends where plain decoding ends
    sampled   the joint distribution of the first three tokens against exact cells of the model's own

A biased speculative loop can have perfect greedy output, and perfect marginals too: mistakes after a
rejection show only in what follows. So the last part draws whole answers and compares three tokens
together. What is audited is anything that answers a `Request` (`answer`): a loop of ours, or
another library's. Every part says how much it would have noticed; an audit that could not have found
the bias that was asked for says `inconclusive`, not `lossless`.
"""
