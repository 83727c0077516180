"""Who else is told of a run's numbers: TensorBoard, and Weights & Biases."""
