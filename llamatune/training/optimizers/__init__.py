"""Optimizers: AdamW, SGD, and AdamW with 8-bit state."""
