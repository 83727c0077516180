"""The judgement of a run: what tuning gained and what it cost, base against tuned, in one result."""
