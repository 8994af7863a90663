"""Our own CPU products, in C++, compiled for the machine at hand on first use.

    products.cpp   W2 to W8 times 16-bit or int8 activations, code books, fp8
    attention.cpp  one new token over a dense cache
    build.py       compiler, flags, cache; says why where it cannot be built
    product.py     lays a stored weight out and calls the product

It needs an x86 CPU with AVX-512 VNNI, VBMI and BF16 (AMD Zen 4 and 5, Intel Sapphire Rapids on)
and a C++ compiler; elsewhere torch's packed products or the plain formula run, and the record says so.
"""
