"""Other tools' result files as peers.

An importer takes the bytes of a file and gives its results in order, or raises `RecordError` with
the place that is wrong. Files come from anywhere: nothing in them is trusted, no number is taken
that contradicts another one, and an unknown key is no error, since tools add keys.
"""

from compresskit.exchange.importers import llama_bench, lm_eval, mlperf, vllm
from compresskit.exchange.importers.fields import Source

__all__ = ["Source", "llama_bench", "lm_eval", "mlperf", "vllm"]
