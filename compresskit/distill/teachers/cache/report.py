"""What a cache costs and what it loses: for the card of a student, and as a line to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.units import Unit, format_quantity

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.distill.teachers.cache.source import Manifest


def facts(manifest: Manifest) -> dict[str, JsonValue]:
    """The part of a card that is about a finished cache; every number is measured.

    bytes_per_token counts the files as they lie on the disk, over the places that have a target (a
    row of L tokens has L - 1).
    """
    return {
        "format": manifest.format,
        "bytes_per_token": manifest.bytes_per_token,
        "bytes": manifest.shard_bytes,
        "dense_bytes_per_token": dense_bytes(manifest),
        "teacher_tokens": manifest.teacher_tokens,
        "teacher_dtype": manifest.dtype,
        "seconds": manifest.seconds,
        "reconstruction": dict(manifest.reconstruction or {}),
        "about": manifest.parsed().about,
    }


def dense_bytes(manifest: Manifest) -> int:
    """What a place would take as a bfloat16 of every token."""
    return 2 * manifest.vocabulary


def line(manifest: Manifest) -> str:
    """One line for people."""
    if manifest.bytes_per_token is None or manifest.shard_bytes is None:
        return f"teacher cache {manifest.format}: unfinished"
    errors = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in (manifest.reconstruction or {}).items()
    )
    return (
        f"teacher cache {manifest.format}: {manifest.bytes_per_token:.1f} bytes a token "
        f"(all logits in bfloat16: {dense_bytes(manifest)}), "
        f"{format_quantity(manifest.shard_bytes, Unit.BYTE)} in all; {errors}"
    )
