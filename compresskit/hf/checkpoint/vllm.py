"""Which of our forms vLLM loads, as its source says; nothing here was run with vLLM.

Read in vllm/model_executor/layers/quantization/compressed_tensors of github.com/vllm-project/vllm:
`compressed_tensors.py` (`_get_scheme_from_parts`, which maps config groups to scheme classes;
commit be696453 and a version of mid-2026 with WNA8Int), `schemes/compressed_tensors_wNa16.py` (bits,
zero points), `utils/marlin_utils.py` (groups of 32, 64, 128 or whole rows). What only the version of
2026 has is marked as recent. A quantised output head came with pull request 37291 (March 2026).
Layers that vLLM fuses (q, k, v; gate, up) have to share one scheme.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.hf.checkpoint.form import Form


class Support(NamedTuple):
    """What vLLM makes of a checkpoint."""

    supported: bool
    words: str
    """The scheme class and what it needs, or why it is not supported."""

    def line(self) -> str:
        """One line for people."""
        return f"vLLM: {'supported scheme' if self.supported else 'not supported:'} {self.words}"


MARLIN_GROUPS = (None, 32, 64, 128)
"""Weights that share a scale; None is a whole row."""
OLD_BITS = (4, 8)
"""Widths that the versions before 2026 knew, and the only ones with zero points since."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def support(forms: Mapping[str, Form], dense: tuple[str, ...], head: str | None) -> Support:
    """Judge a checkpoint by the form of each packed layer and the names of the dense ones."""
    schemes: dict[str, None] = {}
    for form in dict.fromkeys(forms.values()):
        one = scheme(form)
        if not one.supported:
            return one
        schemes[one.words] = None
    split = _split(forms, dense)
    if split:
        return Support(False, f"{split} are one layer in vLLM and differ in their scheme here")
    if head in forms:
        schemes["for the packed output head a version of March 2026 or later"] = None
    return Support(True, "; ".join(schemes))


def scheme(form: Form) -> Support:
    """The scheme class that loads one form."""
    weights, inputs = form.weights, form.activations
    if form.format == "float-quantized":
        if inputs is None:
            return Support(True, "CompressedTensorsW8A16Fp8")
        return Support(
            True, "CompressedTensorsW8A8Fp8 (compute capability 8.9; below it W8A16Fp8 runs)"
        )
    if form.format == "int-quantized":
        return Support(True, "CompressedTensorsW8A8Int8")
    if weights.group not in MARLIN_GROUPS:
        return Support(False, f"groups of {weights.group} (it has 32, 64, 128 and whole rows)")
    if not weights.symmetric and (weights.bits not in OLD_BITS or inputs is not None):
        kind = f"{weights.bits}-bit weights" if inputs is None else "int8 activations"
        return Support(False, f"zero points with {kind}; use symmetric=true")
    recent = f"of {weights.bits} bits, in recent versions"
    if inputs is not None:
        return Support(True, f"CompressedTensorsWNA8Int {recent}")
    if weights.bits in OLD_BITS:
        return Support(True, "CompressedTensorsWNA16")
    return Support(True, f"CompressedTensorsWNA16 {recent}")


def _split(forms: Mapping[str, Form], dense: tuple[str, ...]) -> str:
    """Names of layers that vLLM fuses and that are not of one form; empty if there are none."""
    schemes: dict[str, Form | None] = {**forms, **dict.fromkeys(dense)}
    for name in schemes:
        parent, _, last = name.rpartition(".")
        for parts in FUSED:
            if last == parts[0]:
                beside = [f"{parent}.{part}" for part in parts]
                if len({schemes.get(one) for one in beside if one in schemes}) > 1:
                    return f"{parent}.{{{','.join(parts)}}}"
    return ""
