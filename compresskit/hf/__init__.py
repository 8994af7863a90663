"""All that touches transformers: sources, loading, caches, attention, decode steps.

Nothing outside this package imports transformers, so a change of its internals is absorbed here.
"""

import logging

# transformers imports torchao where it is installed, which on a machine without CUDA warns of each
# of its CUDA libraries and of an enum; neither is anything that a user of ours could act on.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
