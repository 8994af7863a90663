"""Engines, one file each; `compresskit.engine` says how to add one."""
