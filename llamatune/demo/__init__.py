"""``llamatune demo``: a tiny base model, the rows to fine-tune it on, and how both were made."""
