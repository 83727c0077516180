"""Data: rows, row formats, templates, encoding, validation split, prepared directories, batches, packing."""
