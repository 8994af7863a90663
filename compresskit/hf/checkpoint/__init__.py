"""Quantised checkpoints on disk: written as compressed-tensors, read into packed layers.

form.py      one layer: scheme and tensors of the format, and back
layers.py    the packed layers of a system
config.py    config.json
vllm.py      what vLLM makes of it
write.py     the folder
read.py      a loaded checkpoint on our own products
"""
