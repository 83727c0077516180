"""The benchmark: memory, speed and loss of every combination of techniques."""
