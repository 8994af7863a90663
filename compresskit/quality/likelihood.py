"""How well the artefact predicts a text, from the scores of its tokens.

    nll             mean of -log q(token), nats
    perplexity      exp(nll): depends on the tokenizer
    bits per byte   total -log2 q over the UTF-8 bytes of the scored text: does not

Neighbouring tokens are correlated, so the standard error is taken over windows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compresskit import stats
from compresskit.errors import RunError
from compresskit.record import Likelihood

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compresskit.quality.protocol import Plan

_LARGEST_EXPONENT = 700.0
"""exp of more does not fit into a float; a uniform guess over a million tokens is below 14."""


def likelihood(nll: NDArray[np.float32], plan: Plan, scored_bytes: int) -> Likelihood:
    """Summarise the NLL of each window (row) and scored position (column).

    Raises:
        RunError: the model is so far off that its perplexity is not a number.
    """
    windows = [stats.mean(row) for row in nll]
    mean = stats.mean(windows)
    if mean > _LARGEST_EXPONENT:
        raise RunError(
            f"mean negative log-likelihood {mean:.4g} nats per token: the artefact's logits are "
            "unusable, so no perplexity can be stored."
        )
    if scored_bytes == 0:
        raise RunError("the scored tokens decode to no text, so there are no bits per byte.")
    return Likelihood(
        protocol_id=plan.protocol_id,
        text=plan.text.facts(plan.text_tokens),
        scored_tokens=plan.scored_tokens,
        scored_bytes=scored_bytes,
        nll_mean=mean,
        nll_stderr=stats.standard_error(windows),
        perplexity=math.exp(mean),
        bits_per_byte=mean * plan.scored_tokens / scored_bytes / math.log(2),
        window_nll=tuple(windows),
        window_tokens=tuple(len(row) for row in nll),
    )
