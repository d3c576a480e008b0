"""Packed weights on an accelerator: how they lie (`layout.py`), and the kernels that multiply by them (`kernels.py`,
`product.py`)."""
