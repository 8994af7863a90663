"""Triton products with packed codes: what the weight-only operations share on a GPU.

`tiles` is the layout, `triton` the kernels, `product` the prepared weight that calls them.
"""
