"""The switch `COMPRESSKIT_OFFLINE=1`: sources that need a network fail at once instead of waiting.

`HF_HUB_OFFLINE` is the hub's own switch and is left to huggingface_hub.
"""

from __future__ import annotations

import os

from compresskit.errors import ModelError

SWITCH = "COMPRESSKIT_OFFLINE"


def wanted() -> bool:
    """Whether the user asked for no network traffic."""
    return os.environ.get(SWITCH, "").strip().lower() not in {"", "0", "false", "no", "off"}


def refuse(name: str, *, why: str) -> None:
    """Stop before a download if the user works offline.

    Raises:
        ModelError: the switch is set.
    """
    if wanted():
        raise ModelError(
            f"{name} is not on this machine yet ({why}) and {SWITCH} is set. Unset it once to "
            "fetch the model, or use `tiny`, which is shipped."
        )
