"""The second form of `compresskit export`: a compressed model as a checkpoint.

The stack is applied with every layer in its stored form, the tensors are written, and what was
done goes into the model card.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compresskit.artefact import Opened, Plan
    from compresskit.hf.checkpoint.write import Prepared
    from compresskit.record import Quality
    from compresskit.report.join import Joined
    from compresskit.spec import RunSpec


def export(
    spec: RunSpec, out: Path, *, records: Sequence[Path], evaluate: bool, as_json: bool
) -> None:
    """Compress the model of `spec` with its stack and write the folder `out`.

    Raises:
        UsageError: `out` holds something, or the request makes no sense.
        Conflict: the stack has no compressed-tensors form.
    """
    from compresskit_kernels import dispatch

    from compresskit import artefact as artefacts, runner
    from compresskit.cli.progress import console, source_progress
    from compresskit.hf.checkpoint import write
    from compresskit.report import card as cards, join

    write.check_free(out)
    joined = join.load(records) if records else None
    began = time.perf_counter()
    with source_progress() as report:
        plan = artefacts.plan(spec, report)
    _weights_only(plan)

    def told(phase: str, detail: str = "") -> None:
        status.update(f"{phase} {detail}")

    with (
        console.status("loading") as status,
        dispatch.forced("reference"),
        artefacts.opened(plan, told) as opened,
    ):
        prepared = write.prepare(opened.system.model, plan.loaded.path)
        quality = runner.judge_quality(plan, opened, told) if evaluate else None
        told("write", str(out))
        facts = _card(plan, opened, prepared, out, joined, quality)
        files = write.write(prepared, plan.loaded.path, out, cards.render(facts))
    seconds = time.perf_counter() - began
    unmatched = joined is not None and facts.row is None
    if as_json:
        print(json.dumps(_document(out, prepared, facts, files, seconds, unmatched)))
    else:
        _show(out, prepared, facts, files, seconds)
    if unmatched:
        console.print(
            "warning: none of the records is of this stack on this revision of the model; the card "
            "says not measured.",
            markup=False,
        )


def _weights_only(plan: Plan) -> None:
    """Refuse methods that a checkpoint cannot carry, before anything is loaded."""
    from compresskit.errors import Conflict
    from compresskit.method import Stage

    for placed in plan.methods:
        if placed.method.stage not in (Stage.MODEL, Stage.WEIGHTS):
            raise Conflict(
                f"{placed.name} acts while the model runs; a checkpoint holds weights only. "
                "Leave it out here and give it to the commands that run the checkpoint."
            )


def _card(
    plan: Plan,
    opened: Opened,
    prepared: Prepared,
    out: Path,
    joined: Joined | None,
    quality: Quality | None,
) -> Any:
    import compresskit
    from compresskit.hf.load import dtype_name
    from compresskit.hf.sources import known
    from compresskit.report import card as cards

    source, spec = plan.source, plan.spec
    licences = {model.name: model.licence for model in known() if model.name == source.name}
    dtype = dtype_name(opened.system.model)
    bytes_each = {"float32": 4}.get(dtype, 2)
    return cards.Card(
        name=out.resolve().name,
        spec=spec,
        revision=source.revision,
        kind=source.kind,
        licence=licences.get(source.name) or "",
        dtype=dtype,
        forms=prepared.counts(),
        dense=prepared.dense,
        untied=prepared.untied,
        tensor_bytes=prepared.nbytes(),
        base_bytes=bytes_each * opened.parameters,
        parameters=opened.parameters,
        calibration_tokens=opened.setup.calibration_tokens or 0,
        calibration_seconds=opened.setup.apply_seconds,
        vllm=prepared.vllm.line(),
        zero_points=any(not form.weights.symmetric for form in prepared.forms.values()),
        mixed=len(set(prepared.forms.values())) > 1,
        version=compresskit.__version__,
        row=None if joined is None else cards.of_stack(joined, spec, source.revision),
        quality=quality,
    )


def _document(
    out: Path,
    prepared: Prepared,
    facts: Any,
    files: dict[str, int],
    seconds: float,
    unmatched: bool,
) -> dict[str, Any]:
    return {
        "folder": str(out),
        "digest": facts.spec.digest(),
        "format": prepared.config["quantization_config"]["format"],
        "layers": prepared.counts(),
        "left_dense": list(prepared.dense),
        "tensor_bytes": facts.tensor_bytes,
        "effective_bits_per_parameter": 8 * facts.tensor_bytes / facts.parameters,
        "files": files,
        "vllm": {"supported": prepared.vllm.supported, "words": prepared.vllm.words},
        "measured": facts.row is not None or facts.quality is not None,
        "records_matched": None if facts.row is None and not unmatched else not unmatched,
        "seconds": seconds,
    }


def _show(out: Path, prepared: Prepared, facts: Any, files: dict[str, int], seconds: float) -> None:
    from rich.console import Console

    from compresskit.units import Unit, format_quantity, significant

    console = Console()

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    bits = 8 * facts.tensor_bytes / facts.parameters
    size = format_quantity(float(sum(files.values())), Unit.BYTE)
    line(f"{out}: {size} in {len(files)} files, written in {significant(seconds)} s")
    line(f"  format       {prepared.config['quantization_config']['format']} (compressed-tensors)")
    for name, count in prepared.counts().items():
        line(f"  layers       {count} x {name}")
    if prepared.dense:
        line(f"  left dense   {len(prepared.dense)}: {', '.join(prepared.dense[:4])}")
    line(f"  size         {bits:.2f} bits per parameter, everything counted")
    if prepared.untied:
        line(
            "  tied head    it got a packed weight of its own beside the dense embedding; "
            "head=false keeps them one"
        )
    line(f"  {prepared.vllm.line()}")
    line(f"  card         {out / 'README.md'}")
