"""Fine-tune LLaMA models with LoRA from the command line."""

__version__ = "0.1.0"
