"""Compression methods: one file a method, found by its path `<family>/<name>`."""
