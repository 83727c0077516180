"""The options of every verb, each declared once as a field of a frozen dataclass; no torch, no Typer."""
