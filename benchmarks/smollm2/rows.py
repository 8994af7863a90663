"""Pack what the SmolLM2 student learns from: prose, code, and both written out twice.

    python benchmarks/smollm2/rows.py --out build/smollm2/rows.safetensors

A student of 12 to 20 blocks forgets first how to copy, which is what much drafting is about; so one
row in three holds a passage and then the same passage again. Prose is the text `docstrings`, code
is the standard library's own. Nothing of `pydoc`, which tables judge by, is among it. Both differ by
Python version; the card of the student holds the hash of the rows.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from compresskit import text as texts
from compresskit.artefact import find_model
from compresskit.hf.tokenizer import load_tokenizer
from compresskit.spec import ModelSpec

LENGTH = 256
PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging",
            "multiprocessing", "unittest", "urllib", "xml")  # fmt: skip
"""Parts of the standard library whose sources are read."""
CODE_ROWS, COPIES = 900, 900
SEED = 7


def code() -> str:
    """Sources of the packages, joined."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for name in PACKAGES for path in sorted((library / name).rglob("*.py"))]
    return "\n\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)


def cut(ids: list[int], length: int) -> list[list[int]]:
    """Rows of `length` tokens, one after the other; a shorter rest is left out."""
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]


def pack(model: str) -> torch.Tensor:
    """Rows int64 `[R, LENGTH]` in the tokens of `model`, in the order they are made."""
    tokenizer = load_tokenizer(find_model(ModelSpec(name=model)).path, None)
    rng = random.Random(SEED)
    prose = cut(tokenizer.encode(texts.load("docstrings").content, special=False), LENGTH)
    sources = cut(tokenizer.encode(code(), special=False), LENGTH)
    sources = rng.sample(sources, CODE_ROWS + COPIES // 2)
    between = tokenizer.encode("\n\n", special=False)
    half = (LENGTH - len(between)) // 2
    copied = [*rng.sample(prose, COPIES // 2), *sources[CODE_ROWS:]]
    twice = [[*row[:half], *between, *row[:half]] for row in copied]
    twice = [row + row[: LENGTH - len(row)] for row in twice]
    return torch.tensor([*prose, *sources[:CODE_ROWS], *twice])


def main() -> None:
    """Pack and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pypi:smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("build/smollm2/rows.safetensors"))
    args = parser.parse_args()
    rows = pack(args.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": rows.to(torch.int32)}, args.out)
    print(f"{args.out}: {len(rows)} rows of {LENGTH} tokens")


if __name__ == "__main__":
    main()
