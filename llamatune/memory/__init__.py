"""The memory of a training step, computed from the spec and the model's shape. No torch, no weights."""
