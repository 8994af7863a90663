"""Apply compression to open language models and measure what it costs and saves.

One run is one spec in and one record out. The command line (`compresskit --help`) is the usual
door; `compresskit.runner.run` is the same thing as a function. Importing this package does
nothing: no torch, no environment variable, no probe.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
