"""Replay recorded answers through drafters that read nothing but text.

trace   the file format: read, checked, written
record  make a trace: greedy answers of a model
play    the speculative loop itself, on a model that can only say what was recorded
counts  what became of the drafts, in integers
report  the figures under vLLM's names, and a table for people

Which drafts a greedy model accepts depends on its answer alone. So one recording scores every
drafter and every parameter exactly, without the model, in seconds. What it cannot tell is time, and
which of two nearly tied tokens a model in bfloat16 says when a pass has another width.
"""
