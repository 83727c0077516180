"""File names of a run directory. No torch: readers of a finished run import only this."""

SPEC, METRICS, SUMMARY, ORIGIN = "spec.yaml", "metrics.jsonl", "summary.json", "origin.json"
CHECKPOINTS, BEST, ADAPTER, MODEL = "checkpoints", "best", "adapter", "model"


def trace_name(first_step: int) -> str:
    """The profiler's trace of a start whose first step is ``first_step``."""
    return f"trace-from-step-{first_step:06d}.json"
