"""The files and directories that llamatune writes and reads, one module a format. No torch."""
