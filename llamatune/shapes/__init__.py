"""Shapes of models and adapters, recompute levels and parameter counts: what follows from a configuration. No torch."""
