"""Bytes and names: reading checkpoints, writing them, remembering what is done. Knows no scheme."""
