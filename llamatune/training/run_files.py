"""The names in a run directory. Loads no torch: readers of a finished run need nothing else of training."""

SPEC, METRICS, SUMMARY, ORIGIN = "spec.yaml", "metrics.jsonl", "summary.json", "origin.json"
CHECKPOINTS, BEST, ADAPTER, MODEL = "checkpoints", "best", "adapter", "model"


def trace_name(first_step: int) -> str:
    """The profiler's trace of a start that continued with ``first_step``."""
    return f"trace-from-step-{first_step:06d}.json"
