"""File names of a run directory. No torch: readers of a finished run import only this."""

SPEC, METRICS, SUMMARY, ORIGIN = "spec.yaml", "metrics.jsonl", "summary.json", "origin.json"
CHECKPOINTS, BEST, ADAPTER, MODEL = "checkpoints", "best", "adapter", "model"
CELLS = "cells"
"""Of a benchmark's directory, which has the same lock."""
