"""What is on disk: the only rooms that know a file format."""
