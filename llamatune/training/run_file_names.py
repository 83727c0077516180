"""File names of a run directory. No torch: readers of a finished run import only this."""

SPEC, METRICS, SUMMARY, ORIGIN = "spec.yaml", "metrics.jsonl", "summary.json", "origin.json"
CHECKPOINTS, BEST, ADAPTER, MODEL = "checkpoints", "best", "adapter", "model"
CELLS, RUNS = "cells", "runs"
"""Of the directories of a benchmark and of a sweep, which have the same lock."""
