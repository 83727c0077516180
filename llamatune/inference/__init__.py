"""Inference: sampling, generation, and evaluation of models, with or without an adapter."""
