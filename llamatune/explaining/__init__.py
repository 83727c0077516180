"""What exit codes, errors and keys of the run spec mean, as ``explain`` tells."""
