"""Sweeps: several runs of one spec, trained together on a base and in worker processes; their table and page."""
