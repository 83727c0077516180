"""Sweeps: several runs of one spec, those that share a base trained together; their table and page."""
