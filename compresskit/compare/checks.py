"""The one table of what is compared: metric, tier, direction, tolerance, and what must agree.

Where the tolerances come from
    exact     none: bytes and counts have no noise. Digests, forward passes and kernels may differ
              with the CPU, torch or the number of threads (rounding decides near ties), so they
              ask for the same ones.
    nll       0.005 nats per token, half a percent of perplexity: what a good 4-bit format costs
              (llama.cpp's q4_K_M on Llama-3-8B: 0.0050), ten times what an 8-bit one does.
    kl        0.0005 nats per token: what a whole 8-bit format costs (q8_0 on Llama-2-7B: 0.0004).
    top-1     half a percentage point.
    tasks     five percentage points: one prompt of twenty.
    clocks    1.25 across sessions: processes of one program differ by more than their repetitions
              do. Measured with the tiny model, 34 sessions of unchanged code, up to 68 % of the
              time waiting for a CPU, 1 632 comparisons net of waiting: 105 were called worse at
              1.05, 35 at 1.10, 3 at 1.15, none at 1.20. Within a session 1.05 (`stats.verdict`).
    peaks     1.10: resident memory depends on when pages are given back.

`ttft_s` stands for the prefill rate too and `tpot_s` for the step time: one is the other's
reciprocal, or differs from it by tokens per step, which the exact tier counts.
"""

from __future__ import annotations

from compresskit.compare import clocks, exact, quality
from compresskit.compare.agree import MACHINE, SPEC, THREADS, TORCH
from compresskit.compare.line import Check
from compresskit.metrics import speed
from compresskit.units import Unit

ROUNDING = (MACHINE, TORCH, THREADS)
"""What decides the last bit, and with it which of two nearly equal tokens wins."""
SESSION = 1.25
"""Practical factor between two sessions."""

STATUS = Check("status", "exact", "none", exact.status, look="the reason stored in the new record")

CHECKS: tuple[Check, ...] = (
    # Exact counts
    Check("parameters", "exact", "none", exact.weighed(lambda m: m.parameters), Unit.COUNT,
          look="which model was loaded"),
    Check("weights_bytes", "exact", "lower", exact.by_class(lambda m: m.weights_bytes), Unit.BYTE,
          look="what the method packs, and the scales it keeps"),
    Check("effective_bits_per_parameter", "exact", "lower",
          exact.weighed(lambda m: 8 * sum(m.weights_bytes.values()) / max(1, m.parameters)),
          Unit.BIT, look="weights_bytes"),
    Check("cache_bytes", "exact", "lower", exact.by_class(lambda m: m.cache_bytes, of_cache=True),
          Unit.BYTE, look="how many tokens the cache keeps, and in which type"),
    Check("passes", "exact", "higher", exact.sizes, Unit.COUNT,
          look="the reason why a batch size was not run"),
    Check("tokens", "exact", "none",
          exact.per_sample(lambda s: sum(arrival.tokens for arrival in s.arrivals)), Unit.TOKEN,
          look="the decode loop: speed passes have a fixed length"),
    Check("forwards", "exact", "lower", exact.per_sample(lambda s: s.forwards), Unit.COUNT,
          needs=ROUNDING, look="the decode loop, or how much of a draft is accepted"),
    Check("drafted", "exact", "lower", exact.per_sample(lambda s: s.drafted), Unit.TOKEN,
          needs=(SPEC, *ROUNDING), look="the draft"),
    Check("accepted", "exact", "higher", exact.per_sample(lambda s: s.accepted), Unit.TOKEN,
          needs=(SPEC, *ROUNDING), look="the draft, and the rule that accepts its tokens"),
    Check("outputs", "exact", "none", exact.outputs, needs=(SPEC, *ROUNDING),
          look="anything that changes logits: kernels, rounding, cache, acceptance"),
    Check("greedy_outputs", "exact", "none", exact.greedy_outputs, needs=(SPEC, *ROUNDING),
          look="anything that changes logits: kernels, rounding, cache, acceptance"),
    Check("kernels", "exact", "none", exact.kernels, needs=(SPEC, MACHINE, TORCH),
          look="why another implementation was chosen"),
    # Quality
    Check("nll_nats", "quality", "lower", quality.by_window(quality.nll), Unit.NAT, 0.005,
          look="what the method does to weights or cache"),
    Check("kl_mean_nats", "quality", "lower", quality.by_window(quality.kl), Unit.NAT, 0.0005,
          look="what the method does to weights or cache"),
    Check("top1_agreement", "quality", "higher", quality.by_window(quality.top1), Unit.RATIO, 0.005,
          look="what the method does to weights or cache"),
    Check("task_score_aware", "quality", "higher", quality.by_window(quality.tasks("aware")),
          Unit.RATIO, 0.05, look="which task lost, and at which depth"),
    Check("task_score_agnostic", "quality", "higher", quality.by_window(quality.tasks("agnostic")),
          Unit.RATIO, 0.05, look="which task lost, and at which depth"),
    Check("greedy_exact_match", "quality", "higher", quality.exact_match, Unit.RATIO,
          look="first_divergence of the greedy comparison"),
    Check("length_ratio", "quality", "none", quality.length_ratio, Unit.RATIO,
          look="when the artefact stops"),
    # Clocks and joules
    Check("ttft_s", "clocks", "lower", clocks.timed(speed.latency), Unit.SECOND, SESSION, ROUNDING,
          look="the prefill"),
    Check("tpot_s", "clocks", "lower", clocks.timed(speed.latency), Unit.SECOND, SESSION, ROUNDING,
          look="the decode step"),
    Check("decode_tokens_per_s", "clocks", "higher", clocks.timed(speed.headline),
          Unit.TOKEN_PER_SECOND, SESSION, ROUNDING, look="the decode step"),
    Check("decode_tokens_per_s_largest_batch", "clocks", "higher", clocks.larger_batches,
          Unit.TOKEN_PER_SECOND, SESSION, ROUNDING, look="the decode step of a batch"),
    Check("j_per_output_token", "clocks", "lower", clocks.joules,
          Unit.JOULE_PER_TOKEN, SESSION, ROUNDING, look="the decode step, power limits"),
    Check("j_per_prefill_token", "clocks", "lower", clocks.joules,
          Unit.JOULE_PER_TOKEN, SESSION, ROUNDING, look="the prefill, power limits"),
    Check("peak_bytes", "clocks", "lower", clocks.peak, Unit.BYTE, 1.10, ROUNDING,
          look="activations and copies while the artefact is used"),
)  # fmt: skip
