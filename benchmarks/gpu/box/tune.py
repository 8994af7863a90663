"""Launch configurations of this GPU: timed one change at a time and written as a table.

    OUT/tune/<kind>-<rows>.json     what each search found, kept for the next visit
    OUT/tuned/<GPU>.json            the table; copied to kernels/compresskit_kernels/tuned/ it is used from
                                    then on, by the name that torch gives the GPU

A configuration is checked against the reference before it is timed. Without a GPU nothing is timed and the
table that comes out is the default one.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compresskit_kernels import grouped_matmul, int8_dynamic_matmul, int8_matmul, launch
from compresskit_kernels.dispatch import choose

from benchmarks.gpu import shapes, timing, tuning
from benchmarks.gpu.stages import Settings, weight_only

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compresskit_kernels.launch import Tile

    from benchmarks.gpu.box.job import Job

LIMIT = 1e-2
"""As everywhere in these benchmarks: weights, inputs and outputs are rounded to bfloat16."""
MOST_ROWS = 1024
"""Stands for a class of rows without an end."""


class Product(NamedTuple):
    """What is multiplied to time a kind of kernel."""

    op: Any
    weight: Callable[..., Any]


PRODUCTS = {
    "packed_one_row": Product(int8_matmul.OP, weight_only.int8_weight),
    "packed_few_rows": Product(grouped_matmul.OP, weight_only.int4_weight),
    "int8_product": Product(int8_dynamic_matmul.OP, weight_only.int8_weight),
}


class Bench:
    """Times configurations of one kind at one number of rows."""

    def __init__(self, kind: str, rows: int, settings: Settings) -> None:
        """Prepare the products, laid out once for all configurations."""
        self.kind = kind
        self.calls: list[list[Callable[[], torch.Tensor]]] = []
        self.expected: list[torch.Tensor] = []
        op, make = PRODUCTS[kind]
        for size in shapes.WEIGHTS[:1] if rows >= MOST_ROWS else shapes.WEIGHTS:
            x = settings.randn(rows, size[1], seed=1)
            copies = range(timing.copies(size[0] * size[1] // 2))
            weights = [make(settings, seed, size=size) for seed in copies]
            products = [choose(op, x, one, settings.impl).prepare(one) for one in weights]
            reference = choose(op, x, weights[0], "reference").prepare(weights[0])
            self.expected.append(reference(x).float())
            self.calls.append([partial(product, x) for product in products])

    def times(self, candidate: Tile) -> Sequence[float] | None:
        """Median seconds on each shape; None where it is wrong or does not compile."""
        try:
            with launch.trial(self.kind, candidate):
                for calls, expected in zip(self.calls, self.expected, strict=True):
                    got = calls[0]().float()
                    if not float((got - expected).norm() / expected.norm()) <= LIMIT:
                        return None
                return [median(timing.measure(calls).samples) for calls in self.calls]
        except Exception as error:  # noqa: BLE001 - compilers refuse in their own ways: shared memory, registers
            print(f"{self.kind} {candidate}: {type(error).__name__}")
            return None


def run(job: Job) -> int:
    """Search every class of rows of every kind, as far as time allows, and write the table."""
    settings = Settings.dry() if job.is_dry else Settings.cuda()
    if settings is None:
        print("tune: no CUDA device; --dry-run works without one")
        return 2
    table = tuning.default()
    missing = 0
    for kind, entries in table.items():
        for place, start in enumerate(entries):
            path = job.out / "tune" / f"{kind}-{start.most_rows}.json"
            found = tuning.kept(path)
            if found is None:
                if not job.deadline.fits():
                    missing += 1
                    continue
                found = _search(kind, start, settings)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            entries[place] = launch.Tile(**found["tile"])
            gain = found["gain"]
            speed = "not timed" if gain is None else f"{gain:.2f} times as fast as the default"
            print(f"{kind:16} up to {start.most_rows:>10} rows: {speed}")
    name = "dry-run" if job.is_dry else torch.cuda.get_device_name(0)
    target = job.out / "tuned" / f"{name.replace(' ', '_')}.json"
    tuning.write(target, table)
    if missing:
        print(f"no time for {missing} searches, whose entries are the default's: run it again")
    print(f"{target}: copy it to kernels/compresskit_kernels/tuned/ to use it")
    return 0


def _search(kind: str, start: Tile, settings: Settings) -> dict[str, Any]:
    if settings.is_dry:
        found = tuning.search(start, tuning.AXES[kind], lambda candidate: None)
    else:
        bench = Bench(kind, min(start.most_rows, MOST_ROWS), settings)
        found = tuning.search(start, tuning.AXES[kind], bench.times)
    return {"tile": asdict(found.tile), "gain": found.gain, "tried": found.tried}
