"""Trackers of a run's metrics: TensorBoard, and Weights & Biases."""
