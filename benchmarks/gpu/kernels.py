"""Check every kernel on a CUDA machine and time it against its peers, in under ten minutes.

    python benchmarks/gpu/kernels.py --out results/h100/kernels
    python benchmarks/gpu/kernels.py --out /tmp/dry --dry-run           on a CPU, tiny, no speeds

Needs torch, triton and this checkout; no network. Writes one JSON record per operation and shape as
soon as it is measured and skips those that are there, so a run can be cut off and started again.
The table at the end is made from the records.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
# The compiler may fuse a multiply and an add; said aloud, since Triton's default is changing.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# With the package `kernels` installed, bitsandbytes looks for newer code on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.gpu import environment, records, runner, table  # noqa: E402
from benchmarks.gpu.stages import STAGES, Settings  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; return 1 if a kernel of ours was wrong or failed, 2 on bad use."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by comma")
    parser.add_argument("--minutes", type=float, default=10, help="start nothing new after this")
    parser.add_argument("--without", default="", help="peers to leave out, by comma: gemlite")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes through the references")
    options = parser.parse_args(arguments)
    wanted = options.stages.split(",")
    if unknown := [name for name in wanted if name not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    settings = Settings.dry() if options.dry_run else Settings.cuda()
    if settings is None:
        parser.error("no CUDA device; --dry-run works without one")
    began = time.perf_counter()
    store = records.Store(options.out, environment.describe(settings))
    for name in wanted:
        for entry in STAGES[name](settings):
            if store.has(entry):
                continue
            if time.perf_counter() - began > 60 * options.minutes:
                print("time is up; start again to go on", file=sys.stderr)
                break
            print(f"{entry.op} {entry.slug}", file=sys.stderr, flush=True)
            entry = entry.without(name for name in options.without.split(",") if name)
            store.write(entry, runner.run(entry, settings))
    done = store.read()
    print(table.render(done))
    return 1 if table.faults(done) else 0


if __name__ == "__main__":
    sys.exit(main())
