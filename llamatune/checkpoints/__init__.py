"""Models, adapters and run states on disk: Hugging Face, Meta and PEFT directories; loading and merging."""
