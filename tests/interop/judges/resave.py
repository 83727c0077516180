"""Writes a model directory again, in the spelling of the release of transformers that runs this."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

source, target = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
