"""Records in other tools' formats: pure functions from records to text.

Every exporter takes records whose verdict is not INVALID and gives the whole text of a file. Times
come from the raw arrivals; the statistics over them are those of the tool that will read the file.
"""

from compresskit.exchange.exporters import llama_bench, mlperf, optimum, pytest_benchmark, vllm

__all__ = ["llama_bench", "mlperf", "optimum", "pytest_benchmark", "vllm"]
