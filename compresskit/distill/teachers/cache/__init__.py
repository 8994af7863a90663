"""What a teacher said of fixed rows, on disk: written once, read by any number of students.

    formats   what is kept of a distribution, and what that costs: topk, draws
    source    what a cache belongs to: teacher, tokenizer, data; another one is refused
    shard     some rows in one safetensors file, whole or not there
    write     rows ──► teacher ──► shards; goes on where it was stopped
    read      a `Teacher` that looks rows up
    report    what the cache costs and loses, for the card and for the reader

A cache is a folder:

    teacher-cache.json                  what it belongs to, its format, bytes and errors
    rows-00000.safetensors ...          rows in order, the same number in each file but the last
"""
