"""Faster spellings of the ops for CPU, compiled by numba at first use and kept on disk.

rounding.py and packing.py take numpy arrays of stored bits and know nothing of torch, so that the plain path of the
stream need not import it; tensors.py hands torch tensors to them.
"""
