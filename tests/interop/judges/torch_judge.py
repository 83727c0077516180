"""transformers, and PEFT on it, of the release that runs this; an adapter alone is opened by the base that it names."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import answer_all, asks_for_a_reply
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_model(path: str | None, adapter: str | None) -> torch.nn.Module:
    if adapter is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    import peft

    if path is None:
        return peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapter)


@torch.no_grad()
def answer(question: dict[str, Any]) -> dict[str, Any]:
    path, adapter = question["model"], question["adapter"]
    model = open_model(path, adapter).eval()
    rows = [torch.tensor([ids]) for ids in question["ids"]]
    settings = {"do_sample": False, "max_new_tokens": question["new_tokens"], "pad_token_id": 0}
    made = [model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings) for row in rows]
    facts = {
        "release": transformers.__version__,
        "config": model.config.to_dict(),
        "logits": [model(input_ids=row).logits[0].numpy() for row in rows],
        "greedy": [whole[0, row.shape[1] :].tolist() for whole, row in zip(made, rows, strict=True)],
    }
    rope = facts["config"].get("rope_parameters") or facts["config"]
    facts["theta"] = rope["rope_theta"]
    if question["texts"] or question["chats"]:
        tokenizer = AutoTokenizer.from_pretrained(adapter if path is None else path)
        facts["tokenizer"] = type(tokenizer).__name__
        facts["texts"] = [tokenizer.encode(text, split_special_tokens=True) for text in question["texts"]]
        facts["chats"] = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks_for_a_reply(chat))
            for chat in question["chats"]
        ]
    return facts


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer_all(answer)
