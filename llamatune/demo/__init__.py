"""The material of ``llamatune demo``: a tiny base model, the stories it has read, and questions to fine-tune it on."""
