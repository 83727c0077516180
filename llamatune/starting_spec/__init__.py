"""A first run spec for a model, rows and memory: settings that fit, with a reason for each."""
