"""Tokenizers: text to token ids and back, and the tokenizer files of a model directory."""
