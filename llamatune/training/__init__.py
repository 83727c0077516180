"""Training: inputs, schedule, learner, loop, run directory."""
