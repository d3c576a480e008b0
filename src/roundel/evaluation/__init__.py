"""How much a rounded model differs from the one it came from."""
