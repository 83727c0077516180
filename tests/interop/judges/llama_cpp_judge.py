"""llama.cpp through its Python binding: a model is a GGUF file, and so is an adapter.

Its cache of keys and values is kept in fp32 here, so that what is compared is the model.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from protocol import answer_all, asks_for_a_reply

F32 = 0


def answer(question: dict[str, Any]) -> dict[str, Any]:
    model = llama_cpp.Llama(
        question["model"], lora_path=question["adapter"], n_ctx=256, logits_all=True, n_threads=1, n_threads_batch=1,
        type_k=F32, type_v=F32, verbose=False,
    )  # fmt: skip
    facts = model.metadata
    return {
        "release": llama_cpp.__version__,
        "theta": float(facts.get(f"{facts['general.architecture']}.rope.freq_base", 10000)),
        "logits": [logits_of(model, ids).copy() for ids in question["ids"]],
        "greedy": [continued(model, ids, question["new_tokens"]) for ids in question["ids"]],
        "texts": [model.tokenize(text.encode(), add_bos=True, special=False) for text in question["texts"]],
        "chats": [rendered(model, chat) for chat in question["chats"]],
        "facts": facts,
    }


def logits_of(model: llama_cpp.Llama, ids: list[int]) -> Any:
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)]


def continued(model: llama_cpp.Llama, ids: list[int], new_tokens: int) -> list[int]:
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    made = [int(logits_of(model, ids)[-1].argmax())]
    while len(made) < new_tokens and not llama_cpp.llama_vocab_is_eog(vocabulary, made[-1]):
        model.eval(made[-1:])
        made.append(int(model.scores[model.n_tokens - 1].argmax()))
    return made


def rendered(model: llama_cpp.Llama, chat: list[dict[str, str]]) -> str:
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)

    def piece(token: int) -> str:
        return "" if token < 0 else llama_cpp.llama_vocab_get_text(vocabulary, token).decode()

    formatter = Jinja2ChatFormatter(
        model.metadata["tokenizer.chat_template"], piece(model.token_eos()), piece(model.token_bos()),
        add_generation_prompt=asks_for_a_reply(chat),
    )  # fmt: skip
    return formatter(messages=chat).prompt


if __name__ == "__main__":
    answer_all(answer)
