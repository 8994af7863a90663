"""A record: everything one run gave, raw.

Samples and warm-ups are stored as they were taken; every printed number is a function of a record
in `compresskit.metrics`. A missing number is a reading with a reason, never 0 and never NaN.

Schema history
    1   first version
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from compresskit.spec import RunSpec
from compresskit.units import Unit

SCHEMA = 1


class Stored(BaseModel):
    """Base of what is stored: immutable, no NaN; unknown keys of a newer minor version are ignored."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Measured(Stored):
    """A number that a counter gave."""

    kind: Literal["measured"] = "measured"
    value: float
    unit: Unit
    source: str
    """Which counter or call it came from."""


class Estimated(Stored):
    """A number from a model, opted in by the user; never summed or ranked with measured ones."""

    kind: Literal["estimated"] = "estimated"
    value: float
    unit: Unit
    model: str
    """The formula, in words."""


class Unavailable(Stored):
    """No number, and why."""

    kind: Literal["unavailable"] = "unavailable"
    value: None = None
    reason: str


Reading = Annotated[Measured | Estimated | Unavailable, Field(discriminator="kind")]


class Arrival(NamedTuple):
    """When a chunk arrived (seconds since the request started) and how many tokens each row got."""

    seconds: float
    tokens: int


class Sample(Stored):
    """One repetition: arrival times since the request was sent, after a device synchronisation."""

    arrivals: tuple[Arrival, ...]
    forwards: int
    """Forward passes of the target model."""
    drafted: int = 0
    accepted: int = 0


class LatencyPass(Stored):
    """One request at a time, a synchronisation at each chunk."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    warmups: tuple[Sample, ...]
    samples: tuple[Sample, ...]


class ThroughputPass(Stored):
    """One batch size; arrivals hold two marks: first token, last token."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    warmups: tuple[Sample, ...] = ()
    samples: tuple[Sample, ...] = ()
    reason: str | None = None
    """Why this batch size was not run."""


class MemoryPass(Stored):
    """Bytes, read after a forward pass."""

    batch: int
    tokens_in_cache: int
    """Tokens per row that the model had seen when the cache was weighed."""
    weights_bytes: dict[str, int]
    """Bytes held by the weights, by storage class (packed, scales, float ...); shared storage once."""
    parameters: int
    """Number of parameters of the model as loaded, before compression."""
    cache_bytes: int
    """Bytes of every tensor the cache holds."""
    peaks: dict[str, Reading]
    """Peak of each counter in each window, for example `rss/decode`."""


class EnergyWindow(Stored):
    """Energy of one kind of work over one window, with the counter's raw reads."""

    reading: Reading
    window_seconds: float | None = None
    tokens: int | None = None
    reads: tuple[tuple[float, float], ...] = ()
    """Time (s) and cumulated energy (J) at the edges."""
    scope: str | None = None
    """What the counter covers: gpu, package, module ..."""


class EnergyPass(Stored):
    """Prefill-only and generate loops, each in its own window."""

    prefill: EnergyWindow
    generate: EnergyWindow
    batch: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0


class Passes(Stored):
    """What was measured; a pass that was not asked for is null."""

    latency: LatencyPass | None = None
    throughput: tuple[ThroughputPass, ...] | None = None
    memory: MemoryPass | None = None
    energy: EnergyPass | None = None


class Block(Stored):
    """One go through the passes. A repeat appends a block; blocks of one `pair` were interleaved."""

    pair: str | None = None
    started_at: str
    passes: Passes
    load_average: tuple[float, float, float] | None = None


class TextFacts(Stored):
    """Which text was scored or prompted, so that unlike texts are never compared."""

    source: str
    sha256: str
    tokens: int
    bytes: int


class Likelihood(Stored):
    """How well the artefact predicts a text."""

    protocol_id: str
    """Text, window, stride, prefix and unit; deltas across ids are refused."""
    text: TextFacts
    scored_tokens: int
    scored_bytes: int
    nll_mean: float
    """Nats per scored token."""
    nll_stderr: float | None
    """Standard error over windows; null with fewer than two."""
    perplexity: float
    bits_per_byte: float


class Distribution(Stored):
    """Mean, spread and percentiles (numpy linear) of a per-token quantity."""

    mean: float
    stderr: float | None
    percentiles: dict[str, float]


class Fidelity(Stored):
    """How far the artefact's predictions are from the baseline's, on the same tokens."""

    protocol_id: str
    baseline_digest: str
    scored_tokens: int
    kl: Distribution
    """KL(baseline || artefact), nats per token."""
    top1_agreement: float
    top1_stderr: float
    delta_nll: float
    """NLL of the artefact minus NLL of the baseline, nats per token."""
    delta_nll_stderr: float | None
    """Paired, over windows."""
    baseline_nll: float


class GreedyComparison(Stored):
    """Greedy continuations of the artefact beside the baseline's, stopping where each stops."""

    prompts: int
    max_new_tokens: int
    exact_match: float
    """Share of prompts with identical tokens."""
    first_divergence: tuple[int | None, ...]
    """Index of the first different token per prompt; null when identical."""
    length_ratio: float
    """Total tokens of the artefact over the baseline's."""


class Quality(Stored):
    """The quality pass; a part that was not possible is null and `notes` says why."""

    likelihood: Likelihood | None = None
    fidelity: Fidelity | None = None
    greedy: GreedyComparison | None = None
    notes: tuple[str, ...] = ()
    seconds: float | None = None


class Setup(Stored):
    """One-off cost of the artefact."""

    load_seconds: float
    apply_seconds: float
    compile_seconds: float | None = None
    """Duration of the first decode step in compiled mode."""
    energy: Reading = Unavailable(reason="not measured")


class Git(Stored):
    """State of the source tree, where the tool runs from one."""

    commit: str
    dirty: bool


class Environment(Stored):
    """What the run depended on besides the spec."""

    compresskit: str
    python: str
    platform: str
    packages: dict[str, str]
    git: Git | None = None
    variables: dict[str, str] = Field(default_factory=dict)
    """Environment variables that steer threads and libraries."""
    cpu_count: int | None = None
    """Logical CPUs of the machine: what a load average is judged by."""


class ModelFacts(Stored):
    """The weights that were really loaded."""

    kind: str
    """hub, local, gguf, pypi or tiny."""
    revision: str
    baseline: str
    """full_precision, dequantized_gguf, quantized, tiny_trained or random."""
    architecture: str
    parameters: int
    dtype: str
    tokenizer_sha256: str


class DeviceFacts(Stored):
    """The device that was really used."""

    kind: str
    name: str
    memory_bytes: int
    capability: str | None = None
    threads: int | None = None


class Validity(Stored):
    """Verdict on the record itself, from stored evidence."""

    rules: int
    verdict: Literal["VALID", "WARN", "INVALID"]
    reasons: tuple[str, ...] = ()


Status = Literal["ok", "skipped", "failed"]


class Record(Stored):
    """One run, as stored in `results/<machine>/<suite>/<digest>.json`."""

    schema_version: int = SCHEMA
    digest: str
    label: str
    status: Status
    reason: str | None = None
    spec: RunSpec
    started_at: str
    model: ModelFacts | None = None
    device: DeviceFacts | None = None
    environment: Environment | None = None
    prompts: TextFacts | None = None
    """The text the speed passes took their prompts from."""
    prompts_sha256: str | None = None
    """Hash of the prompts' token ids."""
    kernels: dict[str, str] = Field(default_factory=dict)
    simulated: tuple[str, ...] = ()
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    setup: Setup | None = None
    blocks: tuple[Block, ...] = ()
    quality: Quality | None = None
    validity: Validity | None = None
