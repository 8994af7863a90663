"""Results in the formats of other tools, and results of other tools beside ours.

    exporters/    records -> llama-bench, vLLM, optimum-benchmark, pytest-benchmark, MLPerf-like names
    importers/    llama-bench, vLLM, lm-eval, MLPerf LoadGen -> peers
    peers         a result that another tool measured: what is known of it, stored with a checksum
    table         peers as a table of their own: never ranked, divided or judged beside our records
    formats       the formats by name

The same name means different things in different tools ("inter-token latency" may or may not count
tokens that arrive together). An exporter therefore follows the definitions of the tool it writes
for, and an importer keeps a number under one of our names only where the formulae agree; all else
stays under the tool's own name. What a record does not hold is null or absent, never 0.
"""
