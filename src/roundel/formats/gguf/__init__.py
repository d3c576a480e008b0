"""GGUF: block types, and what a file says of a model."""
