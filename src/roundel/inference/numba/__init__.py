"""Products with packed weights on a CPU, compiled by numba at first use and kept on disk.

layout.py says how weights lie, emit.py holds the inner loops as LLVM's vectors, product.py the loops around them.
"""
