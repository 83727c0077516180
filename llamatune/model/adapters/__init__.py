"""Adapters: one file a kind, and what all kinds share."""
