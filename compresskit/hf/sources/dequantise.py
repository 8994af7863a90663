"""The child process that turns a GGUF file into a safetensors folder, once.

    python -m compresskit.hf.sources.dequantise MODEL.gguf OUTPUT_FOLDER DTYPE

Why a process of its own: unpacking needs several times the memory of the model, and the memory of
the process that measures must not remember it (its peak would be ours, not the method's). Library
progress bars and log lines go to this child's stderr, which the parent keeps for error messages.

Two traps of transformers are dealt with here and nowhere else:

- Without `GgufConfig(dequantize=True)` the weights come out dense all the same, but the model stays
  flagged as quantised and refuses to be saved.
- The dtype must be named, or it is whatever the library prefers this year.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compresskit.errors import ModelError


def convert(source: Path, target: Path, dtype: str) -> None:
    """Write config, weights and tokenizer of the GGUF file `source` into the folder `target`.

    Args:
        source: a complete GGUF file.
        target: an existing, empty folder.
        dtype: a torch dtype by name, such as `bfloat16`.

    Raises:
        ModelError: the copy came out flagged as quantised, so no loader would treat it as dense.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError(f"the copy made from {source} is still flagged as quantised")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
