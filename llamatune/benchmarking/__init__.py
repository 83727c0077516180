"""The technique grid: what each technique costs and saves, measured."""
