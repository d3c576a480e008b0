"""What travels with the package: a small language model and texts sampled from it."""
