"""How many bytes a training step needs, in closed form: no torch, no weights."""
