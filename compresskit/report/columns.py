"""The columns of a table: what stands where, under which heading, printed how.

To show another metric, add a line here; its key is its name in `METRICS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from compresskit.report.cells import Style

Section = Literal["speed", "cost and quality", "tasks", "limits and money", "batch", "files"]
"""Where a column is printed; `files` is for CSV and JSON only."""
When = Literal["always", "some number", "per_hour", "per_kwh", "grams_co2_per_kwh"]
"""Which tables show a column: all, those with a number in it, those whose user gave that price."""


@dataclass(frozen=True)
class Column:
    """One column: `key` names it in files, `heading` on paper."""

    key: str
    heading: str
    section: Section
    style: Style
    when: When = "always"


_LIMITS_AND_MONEY = (
    Column("roofline_fraction", "of memory\nlimit", "limits and money", "share", "some number"),
    Column("bound", "bound\nby", "limits and money", "words", "some number"),
    Column(
        "rent_per_million_output_tokens",
        "rent/\nMtok out",
        "limits and money",
        "money",
        "per_hour",
    ),
    Column(
        "break_even_output_tokens_by_time",
        "break-even\n(time)",
        "limits and money",
        "count",
        "per_hour",
    ),
    Column(
        "electricity_per_million_output_tokens",
        "electricity/\nMtok out",
        "limits and money",
        "money",
        "per_kwh",
    ),
    Column(
        "break_even_output_tokens_by_energy",
        "break-even\n(energy)",
        "limits and money",
        "count",
        "per_kwh",
    ),
    Column(
        "gco2e_per_million_output_tokens",
        "CO2e/\nMtok out",
        "limits and money",
        "grams",
        "grams_co2_per_kwh",
    ),
)

_CACHE = (
    Column("cache_nominal_ratio", "cache ÷\nasked", "cost and quality", "ratio", "some number"),
    Column("cache_achieved_ratio", "cache ÷\nheld", "cost and quality", "ratio", "some number"),
)

SPECULATION_FILES = (
    "draft_acceptance_rate",
    "mean_acceptance_length",
    "num_spec_steps",
    "num_verify_forwards",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "acceptance_histogram",
    *(
        f"{kind}_acceptance_at_{place}"
        for kind in ("unconditional", "offered", "conditional")
        for place in (1, 2, 3)
    ),
    "draft_s",
    "verify_s",
    "judge_s",
    "host_s",
    "draft_share",
    "verify_share",
    "host_share",
    "draft_cost",
    "verify_cost",
    "host_cost",
    "speedup_predicted",
    "predicted_ratio_to_baseline",
    "prediction_over_measured",
    "tpot_predicted_s",
    "best_draft_length",
    "drafter_bytes",
    "j_per_accepted_token",
    "lossless",
)
"""What files say about speculation; `--by speculation` prints some of it (`report.speculation`)."""

STUDENT_FILES = (
    "training_s",
    "training_tokens",
    "training_teacher_tokens",
    "training_tokens_per_s",
    "training_energy_j",
)
"""What files say about training; `--by students` prints some of it (`report.students`)."""

COLUMNS = (
    Column("decode_tokens_per_s", "decode\ntok/s", "speed", "plain"),
    Column("decode_ratio_to_baseline", "× same-mode\ndense", "speed", "ratio"),
    Column("decode_ratio_to_best_dense", "× best\ndense", "speed", "ratio"),
    Column("ttft_s", "TTFT", "speed", "quantity"),
    Column("prefill_tokens_per_s", "prefill\ntok/s", "speed", "plain"),
    Column("tokens_per_step", "tok/\nstep", "speed", "plain", when="some number"),
    Column("weights_bytes", "weights", "cost and quality", "quantity"),
    Column("kv_bytes_per_token", "cache/\ntoken", "cost and quality", "quantity"),
    *_CACHE,
    Column("peak_bytes", "peak\nmemory", "cost and quality", "quantity"),
    Column("j_per_output_token", "energy/\ntoken", "cost and quality", "quantity"),
    Column("kl_mean_nats", "KL\n(nats)", "cost and quality", "plain"),
    Column("top1_agreement", "same\ntop-1", "cost and quality", "percent"),
    Column("delta_nll_nats", "ΔNLL ± SE\n(nats)", "cost and quality", "signed"),
    Column("perplexity", "ppl", "cost and quality", "plain"),
    *_LIMITS_AND_MONEY,
    *(
        Column(key, key, "files", "plain")
        for key in (
            "tpot_s",
            "itl_s",
            "output_tokens_per_s",
            "forwards_per_token",
            *SPECULATION_FILES,
            "effective_bits_per_parameter",
            "bits_per_teacher_parameter",
            *STUDENT_FILES,
            "cache_effective_bits",
            "cache_bytes_read_per_token",
            "cache_peak_bytes",
            "load_s",
            "apply_s",
            "compile_s",
            "setup_energy_j",
            "calibration_tokens",
            "moved_bytes_per_s",
            "kwh_per_million_output_tokens",
            "output_tokens_per_kwh",
            "j_per_prefill_token",
            "nll_nats",
            "bits_per_byte",
            "greedy_exact_match",
            "first_divergence_tokens",
        )
    ),
)

SPEED_KEYS = frozenset(c.key for c in COLUMNS if c.section == "speed") | {
    "tpot_s",
    "itl_s",
    "output_tokens_per_s",
    "forwards_per_token",
    *SPECULATION_FILES,
    "j_per_output_token",
    "j_per_prefill_token",
    *(c.key for c in COLUMNS if c.section == "limits and money"),
    "moved_bytes_per_s",
    "kwh_per_million_output_tokens",
    "output_tokens_per_kwh",
}
"""What a simulated or invalid row does not show."""
CACHE_KEYS = frozenset(c.key for c in _CACHE)
"""Without a cache method these say nothing."""
SPECULATION_KEYS = frozenset({"tokens_per_step", *SPECULATION_FILES})
"""Without speculation these are 1 or do not exist: neither deserves a number or a footnote."""
STUDENT_KEYS = frozenset(STUDENT_FILES)
"""Where no student stands in for the model, nothing was trained."""
