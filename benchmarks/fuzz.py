"""Damage valid inputs at random and see that nothing but our own errors comes out.

    python benchmarks/fuzz.py --minutes 5 --seed 1

For every kind of input (specs, suites, records, imported results, files of other tools) a valid
document is changed (keys dropped, types swapped, numbers made huge, negative or none at all, bytes
flipped, text cut), or a random one is made up, and read as the product reads it. A record that is
still readable is judged and exported too. Printed are the counts per kind, the slowest case and every
failure with the seed that makes it again:

    python benchmarks/fuzz.py --kind record --only 123456789

`tests/property/test_fuzz.py` runs the same cases, a few hundred of each kind.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit import store, suite
from compresskit.errors import CompressKitError
from compresskit.exchange import formats, peers, table
from compresskit.record import Record
from compresskit.spec import RunSpec, spec_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
FOREIGN = GOLDEN / "exchange" / "foreign"
SLOWEST_ALLOWED = 10.0
"""Seconds that one case may take; a hang is a failure."""

# Literals that `json.dumps` does not write stand as marked strings and lose their quotes afterwards.
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "1e-999", "01", "1.", "0x10")
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**63, 10**30, 1e18, 1e-18),
    *("", "x", "0.5", "measured", "\u202e\x1b[31m", "x" * 5000, "\x00", "NaN", "../../etc"),
    *([], {}, [None], [[]], {"": ""}, [0] * 100, {"kind": "measured"}, {"value": 1.0}),
    *(f"@@{literal}@@" for literal in RAW),
)


class Kind(NamedTuple):
    """One kind of input: how a case is made and how the product reads it."""

    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], None]


def mutate(value: Any, dice: random.Random) -> Any:
    """Change one thing somewhere inside a container, in place, and return the container.

    Half of the time every place is as likely (so most are numbers in long lists), half of the time
    every step down is (so most are near the top).
    """
    if dice.random() < 0.5:
        places = list(_places(value))
        if places:
            _change(*dice.choice(places), dice)
        return value
    here = value
    for _ in range(dice.randrange(12)):
        below = [part for part in _parts(here) if isinstance(part, (dict, list)) and part]
        if not below:
            break
        here = dice.choice(below)
    keys = list(here) if isinstance(here, dict) else list(range(len(here)))
    if keys:
        _change(here, dice.choice(keys), dice)
    return value


def _parts(here: Any) -> list[Any]:
    return list(here.values()) if isinstance(here, dict) else list(here)


def _places(here: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of every container below `here`."""
    items = here.items() if isinstance(here, dict) else enumerate(here)
    for key, part in items:
        yield here, key
        if isinstance(part, (dict, list)):
            yield from _places(part)


def _change(here: Any, key: Any, dice: random.Random) -> None:
    what = dice.randrange(6)
    if what == 0:
        del here[key]
    elif what == 1 and isinstance(here, dict):
        here[dice.choice(("extra", "", "checksum", f"{key} "))] = here.pop(key)
    elif what == 2 and isinstance(here[key], (int, float)) and not isinstance(here[key], bool):
        here[key] = dice.choice((-here[key], here[key] * 10**9, here[key] + 1, str(here[key])))
    elif what == 3:
        here[key] = [here[key]]
    elif what == 4 and isinstance(here, list):
        here.extend([here[key]] * dice.randrange(1, 4))
    else:
        here[key] = copy.deepcopy(dice.choice(JUNK))


def nested(dice: random.Random, depth: int = 0) -> Any:
    """A made-up JSON value; sometimes far too deep."""
    if dice.random() < 0.01:
        value: Any = 0
        for _ in range(dice.choice((150, 500))):
            value = [value] if dice.random() < 0.5 else {"a": value}
        return value
    if depth > 3 or dice.random() < 0.4:
        return copy.deepcopy(dice.choice(JUNK))
    if dice.random() < 0.5:
        return [nested(dice, depth + 1) for _ in range(dice.randrange(4))]
    names = ("results", "spec", "blocks", "format", "schema_version", "n_prompt", "duration", "x")
    return {dice.choice(names): nested(dice, depth + 1) for _ in range(dice.randrange(5))}


def text_of(value: Any) -> bytes:
    """JSON text in which the marked literals stand bare."""
    text = json.dumps(value)
    for literal in RAW:
        text = text.replace(f'"@@{literal}@@"', literal)
    return text.encode()


def scramble(data: bytes, dice: random.Random) -> bytes:
    """Damage bytes: cut, flip, insert, repeat a line (a key twice), drop a line."""
    what = dice.randrange(6)
    place = dice.randrange(len(data) + 1)
    if what == 0:
        return data[:place]
    if what == 1:
        return data[:place] + bytes([dice.randrange(256)]) + data[place + 1 :]
    if what == 2:
        return data[:place] + dice.randbytes(dice.randrange(1, 9)) + data[place:]
    lines = data.splitlines(keepends=True) or [b""]
    chosen = dice.randrange(len(lines))
    if what == 3:
        lines.insert(dice.randrange(len(lines) + 1), lines[chosen])
    elif what == 4:
        del lines[chosen]
    else:
        dice.shuffle(lines)
    return b"".join(lines)


def damaged(bases: Sequence[bytes]) -> Callable[[random.Random], bytes]:
    """Make cases from valid JSON files (or lines of JSON, or plain text)."""

    def make(dice: random.Random) -> bytes:
        data = dice.choice(bases)
        if dice.random() < 0.1:
            return text_of(nested(dice))
        if dice.random() < 0.8 and data.lstrip()[:1] in (b"{", b"["):
            data = b"\n".join(text_of(_mutated(one, dice)) for one in _documents(data))
        return scramble(data, dice) if dice.random() < 0.4 else data

    return make


def _documents(data: bytes) -> list[Any]:
    """The JSON document of a file, or those of its lines."""
    try:
        return [json.loads(data)]
    except ValueError:
        return [json.loads(line) for line in data.splitlines()]


def _mutated(document: Any, dice: random.Random) -> Any:
    for _ in range(dice.randrange(1, 4)):
        document = mutate(document, dice)
    return document


def signed(bases: Sequence[bytes]) -> Callable[[random.Random], bytes]:
    """Cases whose checksum (and digest) fit: what a doctored file would look like."""
    plain = damaged(bases)

    def make(dice: random.Random) -> bytes:
        if dice.random() < 0.3:
            return plain(dice)
        document = _mutated(json.loads(dice.choice(bases)), dice)
        text = text_of(document)
        try:
            document = json.loads(text)
            if isinstance(document.get("spec"), dict) and "digest" in document:
                document["digest"] = spec_digest(document["spec"])
            document["checksum"] = store.checksum(document)
        except ValueError:
            return text
        return json.dumps(document).encode()

    return make


def _read_spec(data: bytes, folder: Path) -> None:
    RunSpec.decode(_any_json(data), where="fuzz").digest()


def _any_json(data: bytes) -> object:
    """What a caller of `decode` may hold: any Python value that JSON or TOML can give."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode(errors="replace")


def _read_suite(data: bytes, folder: Path) -> None:
    if data.lstrip()[:1] == b"{":
        # What tomllib would give for a suite that is TOML but not a suite.
        found = suite.Suite.decode({"name": "fuzz", **_table(data)}, where="fuzz")
    else:
        path = folder / "fuzz.toml"
        path.write_bytes(data)
        found = suite.read(path)
    suite.resolve(found)


def _table(data: bytes) -> dict[str, Any]:
    value = _any_json(data)
    return value if isinstance(value, dict) else {"value": value}


def _read_record(data: bytes, folder: Path) -> None:
    path = folder / "fuzz.json"
    path.write_bytes(data)
    record = store.load(path)
    assert isinstance(record, Record)
    store.dumps(record)
    kept, _ = formats.usable([record])
    for exporter in formats.EXPORTERS.values():
        exporter.render(kept)


def _read_peer(data: bytes, folder: Path) -> None:
    path = folder / "fuzz.peer.json"
    path.write_bytes(data)
    _print([peers.load(path)])


def _read_foreign(tool: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        found = formats.parse(data, tool, where="fuzz")
        _print(found)
        for one in found:
            peers.dumps(one)

    return read


def _print(found: list[peers.Peer]) -> None:
    table.markdown(found)
    table.csv(found)
    table.document(found)


def _bases(*patterns: str, folder: Path = GOLDEN) -> list[bytes]:
    return [path.read_bytes() for pattern in patterns for path in sorted(folder.glob(pattern))]


def kinds() -> dict[str, Kind]:
    """All kinds of input, with valid examples read from the tests and the shipped suites."""
    records = _bases("records/v1/*.json", "records/v2/*.json")
    suites = _bases("*.toml", folder=ROOT / "benchmarks")
    suites += _bases("assets/suites/*.toml", folder=ROOT / "compresskit")
    suites += [json.dumps(tomllib.loads(one.decode())).encode() for one in suites]
    specs = [json.dumps(json.loads(one)["spec"]).encode() for one in records]
    stored = [
        peers.dumps(one).encode()
        for name, tool in (("vllm.json", "vllm"), ("lm-eval.json", "lm-eval"))
        for one in formats.read(FOREIGN / name, tool)
    ]
    patterns = {"llama-bench": "llama-bench.*", "vllm": "vllm.*", "lm-eval": "lm-eval.*"}
    patterns["mlperf"] = "mlperf-*.txt"
    return {
        "spec": Kind(damaged(specs), _read_spec),
        "suite": Kind(damaged(suites), _read_suite),
        "record": Kind(signed(records), _read_record),
        "peer": Kind(signed(stored), _read_peer),
        **{
            tool: Kind(damaged(_bases(pattern, folder=FOREIGN)), _read_foreign(tool))
            for tool, pattern in patterns.items()
        },
    }


def run_one(kind: Kind, seed: int, folder: Path) -> bool:
    """Run one case; True if it was accepted, False if one of our errors refused it.

    Raises:
        Exception: anything else that came out of the product.
    """
    data = kind.make(random.Random(seed))
    try:
        kind.read(data, folder)
    except CompressKitError as error:
        if not str(error).strip():
            raise AssertionError("an error without a sentence") from error
        return False
    return True


def main() -> None:
    """Run until the time is over; exit 1 if anything came out that should not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="only this kind of input; repeatable")
    parser.add_argument("--only", type=int, help="run this one case and show what comes out")
    args = parser.parse_args()
    chosen = {name: kind for name, kind in kinds().items() if not args.kind or name in args.kind}
    counts: Counter[tuple[str, str]] = Counter()
    failures: Counter[str] = Counter()
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only is not None:
            for kind in chosen.values():
                print(kind.make(random.Random(args.only)).decode(errors="replace")[:2000])
                print("accepted:", run_one(kind, args.only, folder))
            return
        end, seed = time.monotonic() + 60 * args.minutes, args.seed * 10**9
        while time.monotonic() < end:
            for label, kind in chosen.items():
                started = time.monotonic()
                try:
                    outcome = "accepted" if run_one(kind, seed, folder) else "refused"
                except Exception as error:  # noqa: BLE001 - finding these is the purpose
                    outcome = "FAILED"
                    frame = traceback.extract_tb(error.__traceback__)[-1]
                    where = f"{label}: {type(error).__name__} at {frame.filename}:{frame.lineno}"
                    if not failures[where]:
                        print(f"{where}: {str(error)[:300]} (--kind {label} --only {seed})")
                    failures[where] += 1
                spent = time.monotonic() - started
                if spent > SLOWEST_ALLOWED:
                    failures[f"{label}: took {spent:.1f} s (--only {seed})"] += 1
                slowest = max(slowest, (spent, f"{label} --only {seed}"))
                counts[label, outcome] += 1
            seed += 1
    for label in chosen:
        told = ", ".join(f"{counts[label, o]} {o}" for o in ("accepted", "refused", "FAILED"))
        print(f"{label:12} {told}")
    print(f"{sum(counts.values())} cases; slowest {slowest[0]:.3f} s ({slowest[1]})")
    for where, count in failures.most_common():
        print(f"{count:6} x {where}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
