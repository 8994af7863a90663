"""How far a student is from its teacher, place by place, and the gradient of that.

    divergences       plain functions of two whole distributions: one formula each
    sparse            what is left of them where the teacher is known in part: top-k, random draws
    term              a summand of a loss; the text itself, hidden states
    divergence_terms  the divergences as summands, with their parameters
    terms             all of them by name, as typed behind `--loss`
    chunked           the sum of all terms and its gradient, a few places at a time

A term that is a divergence has one formula, in `divergences`. With the teacher's top-k it is applied
to `K + 1` buckets instead of `V` tokens, the last one holding all other tokens together; merging
outcomes never raises an f-divergence, so the value is a lower bound of the full one.
"""
