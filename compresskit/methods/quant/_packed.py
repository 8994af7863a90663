"""The layers that stand in for dense ones; they lie below, where checkpoints are loaded too."""

from compresskit.hf.packed import PackedEmbedding, PackedLinear

__all__ = ["PackedEmbedding", "PackedLinear"]
