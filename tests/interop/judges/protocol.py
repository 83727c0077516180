"""What every judge does: read a file of questions, answer each one, and write a file of answers, or why there is none.

A question names a ``model`` and perhaps an ``adapter``, rows of token ``ids`` whose logits are saved to the file
``logits`` and that are continued greedily by ``new_tokens``, ``texts`` to encode and ``chats`` to render.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def answer_all(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the questions in the file that is named first, in the file that is named second."""
    questions, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps([_answered(answer, question) for question in json.loads(questions.read_text())]))


def _answered(answer: Callable[[dict[str, Any]], dict[str, Any]], question: dict[str, Any]) -> dict[str, Any]:
    try:
        facts = answer(question)
        np.savez(question["logits"], *facts.pop("logits"))
        return facts
    except Exception:
        return {"fault": traceback.format_exc()}


def asks_for_a_reply(messages: list[dict[str, str]]) -> bool:
    return messages[-1]["role"] != "assistant"
