"""Rules about the run and what it ran: its end, its kernels, its baseline, its own words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.validity.finding import Finding, series

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.record import Record


def finished(record: Record) -> Iterator[Finding]:
    """A run that was skipped or failed has no numbers to compare."""
    if record.status != "ok":
        yield Finding(True, record.status, record.reason or "no reason was stored")


def real_speed(record: Record) -> Iterator[Finding]:
    """A simulated saving has a quality, but no speed."""
    if record.simulated and any(one.samples for one in series(record)):
        names = ", ".join(record.simulated)
        yield Finding(True, "simulated_speed", f"{names} is simulated: its speed means nothing")


def kernels_engaged(record: Record) -> Iterator[Finding]:
    """A run on a GPU that fell back to reference code measures the reference code.

    On the CPU the reference is the product, unless the method promised more: `promised_kernels`
    in the facts lists the operations for which it did.
    """
    promised = record.facts.get("promised_kernels")
    names = set(map(str, promised)) if isinstance(promised, list) else set()
    gpu = record.device is not None and record.device.kind == "cuda"
    for operation, implementation in sorted(record.kernels.items()):
        if implementation.startswith("reference") and (gpu or operation in names):
            yield Finding(False, "kernel_not_engaged", f"{operation} ran as {implementation}")
    for operation in sorted(names - set(record.kernels)):
        yield Finding(False, "kernel_not_engaged", f"{operation} was promised and did not run")


def packed_products(record: Record) -> Iterator[Finding]:
    """A quantised layer that ends in a dense product was dequantised in the step that was timed.

    `profile` in the facts holds one decode step: its dense products, and how many layers are dense.
    """
    profile = record.facts.get("profile")
    if not isinstance(profile, dict) or not record.facts.get("quantized_parameters"):
        return
    products, layers = profile.get("dense_products"), profile.get("dense_layers")
    if isinstance(products, int) and isinstance(layers, int) and products > layers:
        detail = (
            f"a step called {products} dense products for {layers} dense layers: quantised weights "
            "were dequantised in every call, so its speed is not the format's"
        )
        yield Finding(False, "kernel_not_engaged", detail)


def unseen_text(record: Record) -> Iterator[Finding]:
    """Quality on the text that a method was calibrated on is quality on the answers."""
    calibration = record.facts.get("calibration")
    likelihood = None if record.quality is None else record.quality.likelihood
    if not isinstance(calibration, dict) or likelihood is None:
        return
    if calibration.get("text_sha256") == likelihood.text.sha256:
        detail = f"calibrated on the text it is judged on ({likelihood.text.source})"
        yield Finding(True, "calibrated_on_evaluation", detail)


def no_cache_hits(record: Record) -> Iterator[Finding]:
    """A prompt that was answered from an earlier one was not computed.

    `prefix_cache_hits` in the facts counts them; a method whose point they are says
    `prefix_cache: on`.
    """
    hits = record.facts.get("prefix_cache_hits")
    if isinstance(hits, int | float) and hits > 0 and record.facts.get("prefix_cache") != "on":
        detail = f"{hits:g} prompts were taken from a cache that this row does not declare"
        yield Finding(False, "prefix_cache_hit", detail)


def same_protocol(record: Record) -> Iterator[Finding]:
    """Distances belong to the dense run of this very spec."""
    fidelity = None if record.quality is None else record.quality.fidelity
    if fidelity is None:
        return
    dense = {spec.digest() for spec in record.spec.best_dense()}
    if fidelity.baseline_digest not in dense:
        detail = (
            f"distances were taken from {fidelity.baseline_digest}, not from this spec's baseline"
        )
        yield Finding(False, "protocol_mismatch", detail)


def sound_baseline(record: Record) -> Iterator[Finding]:
    """Random weights prove mechanics, never quality; a pass that was refused says so by its notes."""
    kind = None if record.model is None else record.model.baseline
    found = record.quality
    if (
        kind == "random"
        and found is not None
        and (found.likelihood or found.fidelity or found.tasks)
    ):
        yield Finding(False, "random_weights", "quality of random weights says nothing")


def own_warnings(record: Record) -> Iterator[Finding]:
    """What the method or the loader wanted said: `warnings` in the facts, a list of sentences."""
    warnings = record.facts.get("warnings")
    for warning in warnings if isinstance(warnings, list) else ():
        yield Finding(False, "warning", str(warning))
