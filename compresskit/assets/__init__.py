"""The files that travel with the package: three tiny models and two texts.

    tiny/target   Llama, 4 layers: the model of the quick start and of most tests
    tiny/draft    Llama, 2 layers, same vocabulary: proposes tokens for the target
    tiny/moe      Mixtral, 8 experts, 2 of them per token
    text/heldout.txt, text/calibration.txt      for evaluating and for calibrating; disjoint

They are trained by `benchmarks/tiny/train.py` on text of our own making, so that a fresh
installation can show real quality losses with no download. `tiny/README.md` says what the models
can do, `tiny/training.json` how they were made and `tiny/evaluation.json` what was measured.

This module only knows where the files are. It imports nothing but `pathlib`: it sits in the lowest
layer, below everything that needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

TinyRole = Literal["target", "draft", "moe"]
TextName = Literal["heldout", "calibration"]

TINY_ROLES: tuple[TinyRole, ...] = get_args(TinyRole)
TEXT_NAMES: tuple[TextName, ...] = get_args(TextName)

_HERE = Path(__file__).resolve().parent


def tiny_path(role: TinyRole) -> Path:
    """Return the folder of a tiny model, as `from_pretrained` wants it."""
    if role not in TINY_ROLES:
        raise LookupError(f"no tiny model {role!r}; there are {', '.join(TINY_ROLES)}")
    return _HERE / "tiny" / role


def text_path(name: TextName) -> Path:
    """Return the file of a shipped text (UTF-8)."""
    if name not in TEXT_NAMES:
        raise LookupError(f"no shipped text {name!r}; there are {', '.join(TEXT_NAMES)}")
    return _HERE / "text" / f"{name}.txt"
