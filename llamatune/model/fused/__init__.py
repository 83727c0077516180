"""The fused block: a LoRA block computed by hand-written autograd functions that keep little for the backward pass."""
