"""A record: everything one run gave, raw.

Samples and warm-ups are stored as they were taken; every printed number is a function of a record
in `compresskit.metrics`. A missing number is a reading with a reason, never 0 and never NaN.

Schema history (`compresskit.migrate` brings older records here)
    1   first version
    2   paired turns with a yardstick; memory by phase and part; energy in several windows, with the
        counter's tick and a cross-check; telemetry; per-window quality; the machine's limits
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from compresskit.spec import Prices, RunSpec
from compresskit.units import Unit

SCHEMA = 2


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
    waited: float | None = None
    """Seconds in which this process was ready to run and another one had the CPU (Linux
    schedstat): what load on the machine took from this very sample. Null where nobody counts."""
    tokens_sha256: str | None = None
    """Hash of the token ids that were delivered: equal hashes, equal output."""
    # Left out where there is none, so that older records are written as they were read.
    prompt_tokens: Annotated[float | None, Field(exclude_if=lambda one: one is None)] = None
    """Tokens of a prompt, the mean of the rows, where prompts have lengths of their own."""
    per_step_drafted: Annotated[
        tuple[tuple[int, ...], ...] | None, Field(exclude_if=lambda rows: rows is None)
    ] = None
    """Tokens drafted before each chunk that gave a row tokens, by row: the first is the prefill's."""
    per_step_accepted: Annotated[
        tuple[tuple[int, ...], ...] | None, Field(exclude_if=lambda rows: rows is None)
    ] = None
    """How many of these were delivered, in the same places; the model's own token is not among them."""
    parts: Annotated[
        dict[str, tuple[float, ...]] | None, Field(exclude_if=lambda parts: parts is None)
    ] = None
    """Seconds of the parts of the steps, in order: draft and verify (from the second chunk on), judge
    (every chunk). Null where the loop has no parts, and where single chunks are not timed."""


class StepCosts(Stored):
    """Passes of several widths through the finished system, timed in turns; raw."""

    batch: int
    tokens_in_cache: int
    """Tokens per row before each pass."""
    widths: tuple[int, ...]
    """Tokens per row of a pass, rising from 1."""
    padded: bool = False
    """The loop fills its passes up to the next of these widths."""
    seconds: tuple[tuple[float, ...], ...]
    """Of each width, one a round."""
    waited: tuple[tuple[float, ...], ...] | None = None
    """Seconds of these in which another process had the CPU; null where nobody counts them."""
    trial: Sample | None = None
    """A request that was decoded for the costs of drafting and of the host; null where the latency
    pass tells them."""


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


class Phase(Stored):
    """One window of a run (load, compress, prefill, decode), its peaks reset at its beginning."""

    peaks: dict[str, Reading]
    """Highest mark by counter: rss; cuda_allocated, cuda_reserved, process_vram on a GPU."""
    counter: str | None = None
    """The peak that `parts` explain; null where no attribution was tried."""
    parts: dict[str, Reading] = Field(default_factory=dict)
    """What that peak is made of, in bytes: runtime, weights, cache, activations, workspace, slack; on
    a CPU also libraries (pages of mapped code), checkpoint (pages of the mapped model file that no
    weight uses any more) and compiler (what building graphs took). Peak minus parts is shown as
    `unattributed`; it is never forced to zero."""


class MemoryPass(Stored):
    """Bytes, read after a forward pass."""

    batch: int
    tokens_in_cache: int
    """Tokens per row that the model had seen when the cache was weighed."""
    weights_bytes: dict[str, int]
    """Bytes held by the weights, by storage class (packed, scales, zero_points, dense ...); shared
    storage once."""
    parameters: int
    """Number of parameters of the model as loaded, before compression."""
    cache_bytes: dict[str, int]
    """Bytes that the cache holds, by what they are (keys_values, codes, scales, residual, index)."""
    # Left out where it is not known, so that older records are written as they were read.
    dense_cache: Annotated[dict[str, int] | None, Field(exclude_if=lambda one: one is None)] = None
    """What the model's own cache would hold at this batch and length, by the keys and values that
    arrived: `bytes` in the model's type, and how many `numbers` these are. Null in older records,
    and where no keys and values are cached."""
    drafter_bytes: Annotated[int | None, Field(exclude_if=lambda one: one is None)] = None
    """What the drafter of a speculative loop held at the end of the request: tables, texts and the cache
    of a draft model, but no weights. Null where nothing drafts or the drafter does not tell."""
    moved_bytes: dict[str, int] | None = None
    """Bytes that one decode step at this batch and cache length has to read: weights (an embedding
    only where it is also the head; of a mixture only the active experts), cache; and `cache_copy`,
    the full-precision copy that a step writes where a quantised cache is unpacked whole."""
    operations_per_step: int | None = None
    """Operations that torch dispatches in the last decode step, views left out; null where a step is
    a compiled graph, which dispatches none."""
    phases: dict[str, Phase] = Field(default_factory=dict)


class EnergyWindow(Stored):
    """Energy of one kind of work over one window, with the counter's raw reads."""

    reading: Reading
    """Gross joules: idle power is not taken off."""
    window_seconds: float | None = None
    tokens: int | None = None
    """Prompt tokens (prefill) or delivered tokens (generate) in the window, all rows."""
    reads: tuple[tuple[float, float], ...] = ()
    """Time (s) and cumulated energy (J) at the edges."""
    scope: str | None = None
    """What the counter covers: gpu, package, module ..."""
    devices: tuple[str, ...] = ()
    """Hashed identifiers of what was summed: deltas are only taken on the same devices."""
    ticks: int | None = None
    """How often the counter moved within the window, counted or window over tick."""
    tick_seconds: float | None = None
    """Measured time between two changes of the counter; null where too few were seen."""
    quantisation: float | None = None
    """Largest relative error that the tick leaves: tick over window; null after edge alignment."""
    integrated: Reading | None = None
    """Power integrated over the same window: the cross-check; never the headline beside a counter."""
    domains: dict[str, Reading] = Field(default_factory=dict)
    """Counters beside the headline that are never added to it, for example dram."""


class EnergyPass(Stored):
    """Prefill-only and generate loops, each in windows of its own, and the loaded machine idle."""

    prefill: tuple[EnergyWindow, ...]
    generate: tuple[EnergyWindow, ...]
    idle: EnergyWindow | None = None
    """Model loaded, nothing running: joules over seconds are the idle watts."""
    batch: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0


class Passes(Stored):
    """What was measured; a pass that was not asked for is null."""

    latency: LatencyPass | None = None
    throughput: tuple[ThroughputPass, ...] | None = None
    memory: MemoryPass | None = None
    energy: EnergyPass | None = None


class Turn(Stored):
    """One go of one side in an interleaved session: the i-th sample of every pass was taken in it."""

    round: int
    """Rounds hold one turn of every side; equal rounds of one session are pairs."""
    position: int
    """Place within the round: the order is shuffled."""
    started: float
    """Seconds on the system's monotonic clock, which all processes of one boot share."""
    yardstick: float | None = None
    """Seconds of a fixed piece of work, timed right before and net of waiting for a CPU: how fast the
    machine itself was."""


class GpuState(Stored):
    """What NVML said about one GPU at one moment; null where it did not answer."""

    device: str
    """Hashed UUID."""
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    throttle: tuple[str, ...] = ()
    """Active reasons: power_cap, hw_slowdown, sw_thermal, hw_thermal, power_brake."""
    throttled_seconds: dict[str, float] = Field(default_factory=dict)
    """Cumulated violation time by policy (power, thermal): only differences mean something."""
    foreign_processes: int | None = None
    """Compute processes on the GPU that are not of this session."""


class Telemetry(Stored):
    """State of the machine at one moment of a session."""

    seconds: float
    """Since the session began."""
    load_average: float | None = None
    """Over one minute."""
    cpu_mhz: float | None = None
    gpus: tuple[GpuState, ...] = ()


class Block(Stored):
    """One go through the passes. A repeat appends a block; blocks of one `pair` were interleaved."""

    pair: str | None = None
    """Identifier of the interleaved session; null for a run on its own."""
    turns: tuple[Turn, ...] = ()
    """The i-th turn took the i-th sample of every speed pass."""
    started_at: str
    passes: Passes
    load_average: tuple[float, float, float] | None = None
    telemetry: tuple[Telemetry, ...] = ()


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
    window_nll: tuple[float, ...] = ()
    """Mean nats per scored token of each window, in order: what paired comparisons resample."""
    window_tokens: tuple[int, ...] = ()
    """Scored tokens of each window: the weights of `window_nll`."""


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
    window_kl: tuple[float, ...] = ()
    """Mean KL of each window, in order."""
    window_top1: tuple[int, ...] = ()
    """Positions of each window whose most likely token agreed."""
    window_tokens: tuple[int, ...] = ()
    """Scored positions of each window."""


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
    outputs_sha256: tuple[str, ...] = ()
    """Hash of the artefact's token ids per prompt."""


class TaskAnswers(Stored):
    """One system's answers to the prompts of one task, in order."""

    scores: tuple[float, ...]
    """Share of the references that the answer holds, per prompt."""
    lengths: tuple[int, ...]
    """Tokens of each answer."""
    outputs_sha256: tuple[str, ...] = ()
    """Hash of the answers' token ids, per prompt."""
    context_tokens: tuple[int, ...] = ()
    """Tokens that a shortened prompt was left with; empty where the whole prompt was given."""


class TaskResult(Stored):
    """One long-context task: the artefact, the full cache and the controls on the same prompts."""

    task: str
    prompt_tokens: tuple[int, ...]
    """Tokens of each prompt, its question and the given beginning of the answer included."""
    depths: tuple[float | None, ...]
    """Where the needle of each prompt lies, 0 to 1; null where there is no such place."""
    answers: dict[str, TaskAnswers]
    """The artefact's, by when the question came: aware or agnostic."""
    reference: dict[str, TaskAnswers] = Field(default_factory=dict)
    """The baseline's with its full cache, always both ways: the difference between the two is
    rounding, the noise floor. If the run is its own baseline, `answers` hold one way or both, and
    this holds both."""
    controls: dict[str, TaskAnswers] = Field(default_factory=dict)
    """The baseline's on damaged prompts, which must be worse. removed: the needles are cut out;
    truncated_aware, truncated_agnostic: only as many of the newest tokens as a full cache holds in
    the bytes that the artefact's cache took."""


class TaskQuality(Stored):
    """Long-context tasks; every figure is computed from the answers of the single prompts."""

    protocol_id: str
    """Style, length, and the hash of all prompts: scores across ids are not compared."""
    baseline_digest: str | None = None
    """The run that the reference is; null if it is this one."""
    results: tuple[TaskResult, ...]
    notes: tuple[str, ...] = ()


class Quality(Stored):
    """The quality pass; a part that was not possible is null and `notes` says why."""

    likelihood: Likelihood | None = None
    fidelity: Fidelity | None = None
    greedy: GreedyComparison | None = None
    # Left out where no task was asked for, as in the spec.
    tasks: Annotated[TaskQuality | None, Field(exclude_if=lambda tasks: tasks is None)] = None
    notes: tuple[str, ...] = ()
    seconds: float | None = None


class Training(Stored):
    """What it took to train a model before the run; the run itself trained nothing."""

    seconds: float
    """Of the whole training: the teacher's passes, held-out checks and checkpoints included."""
    energy: Reading
    """Joules of the same time."""
    steps: int
    tokens: int
    """Tokens learned from, repeated ones as often as they were read."""
    teacher_tokens: int
    """Tokens that the teacher read: fewer where a cache was read again, 0 where it was not asked."""
    device: str
    """Name of what it ran on."""
    threads: int | None = None
    processes: int = 1
    started_at: str


class Setup(Stored):
    """One-off cost of the artefact."""

    load_seconds: float
    apply_seconds: float
    compile_seconds: float | None = None
    """Duration of what builds the compiled steps: the first request that is decoded."""
    energy: Reading = Unavailable(reason="not measured")
    """Joules of loading and compressing."""
    calibration_tokens: int | None = None
    """Tokens that the methods asked for to calibrate; null in records older than schema 2."""
    step_costs: Annotated[StepCosts | None, Field(exclude_if=lambda one: one is None)] = None
    """What passes of several tokens cost, where the stack speculates. Probed before the speed passes;
    an adaptive draft length needs them at set-up, and then they are part of `apply_seconds`, or, where
    steps are compiled for them, of `compile_seconds`."""
    training: Annotated[Training | None, Field(exclude_if=lambda one: one is None)] = None
    """What training the model cost, where the stack trained one (a distilled student)."""


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
    # Left out where it is one, so that older records are written as they were read.
    gpus: Annotated[int | None, Field(exclude_if=lambda one: one is None)] = None
    """How many GPUs of this kind the model was placed on; null where nothing was placed on GPUs."""


class Limits(Stored):
    """What this machine can do at best, measured once by `compresskit doctor --measure`."""

    copy_bytes_per_second: Reading
    """Bytes read plus bytes written per second of a large copy, on the threads of the run."""
    matmul_flops_per_second: Reading
    """Floating-point operations per second of a large matrix product in the run's dtype."""
    dispatch_seconds: Reading
    """Time to launch one operation on one element: what a step pays per kernel whatever its size."""
    threads: int | None = None
    dtype: str | None = None
    measured_at: str | None = None


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
    limits: Limits | None = None
    """The machine's limits as its file told them when the run was made."""
    prices: Prices | None = None
    """What the suite said about money and carbon; money is computed when it is printed."""
    blocks: tuple[Block, ...] = ()
    quality: Quality | None = None
    validity: Validity | None = None
