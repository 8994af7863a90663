"""One stage of a visit to a GPU machine; each takes less than ten minutes and goes on where it stopped.

    python benchmarks/gpu/run.py check --out results
    python benchmarks/gpu/run.py models --out results                     again and again, until it is done
    python benchmarks/gpu/run.py models --out results --model random:llama-3.2-1b
    python benchmarks/gpu/run.py models --out /tmp/dry --dry-run          on a CPU, small, in seconds

README.md in this folder says which stages there are, in which order, and what to carry.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = PATHS
# Children and libraries of this process: our checkout first, no network, and what Triton may fuse said
# aloud, since its default is changing.
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from benchmarks.gpu.box import STAGES, Job  # noqa: E402
from compresskit.errors import CompressKitError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; return its exit code: 1 if something of ours failed, 2 on bad use."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing that ends later")
    parser.add_argument(
        "--model", action="append", default=[], help="instead of the stage's; repeat"
    )
    parser.add_argument(
        "--without", default="", help="peers to leave out, by comma: gemlite,torchao"
    )
    parser.add_argument("--resident", type=int, help="rows that are measured side by side")
    parser.add_argument("--dry-run", action="store_true", help="small, on a CPU: no speeds")
    options = parser.parse_args(arguments)
    job = Job(
        out=options.out,
        minutes=options.minutes,
        is_dry=options.dry_run,
        models=tuple(options.model),
        without=tuple(name for name in options.without.split(",") if name),
        resident=options.resident,
    )
    if job.is_dry:
        print("dry run: sizes are small and speeds mean nothing", file=sys.stderr)
    try:
        return STAGES[options.stage](job)
    except CompressKitError as error:
        print(f"{options.stage}: {error}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
