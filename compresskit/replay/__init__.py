"""Replay a trace of requests through a store of prefixes.

trace   the file format: read, checked, written
make    traces with shared beginnings: chats, few-shot prompts, agents
play    every request with the store and without it, in alternation
report  hit ratio, time to first token, what the store holds
"""
