"""Running a checkpoint: a working transformers model whose rounded layers stay packed.

`loading.load` builds the model class empty and fills it layer by layer; a backend (`backends/`) turns one layer's codes
into a module that multiplies by it.
"""
