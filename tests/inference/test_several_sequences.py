"""Several completions of a prompt: draws, and the best beams."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.errors import SpecError
from llamatune.inference.engine import complete, completions
from llamatune.inference.sampling import token_distribution
from llamatune.model.transformer import Transformer
from llamatune.seeds import derived_seed

Command = Callable[..., Any]
_chance = random.Random(9)
PROMPTS = [[1, *(_chance.randrange(3, 131) for _ in range(length))] for length in (7, 1, 23, 0, 12)]


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base()


@pytest.fixture(scope="module")
def model(base: Path) -> Transformer:
    return load_model(base).eval()


@pytest.fixture(scope="module")
def reference(base: Path) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base)


def test_draws_differ_and_depend_on_the_seed_and_their_number_alone(model: Transformer) -> None:
    one, several = Sampling(16, 1.0, seed=3), Sampling(16, 1.0, seed=3, num_return_sequences=4)
    eos = set(range(3, 9))
    found = complete(model, PROMPTS, several, eos)
    assert found[::4] == complete(model, PROMPTS, one, eos)
    for place, prompt in enumerate(PROMPTS):
        of_prompt = found[4 * place : 4 * place + 4]
        assert len({tuple(made.ids) for made in of_prompt}) == 4
        for rows in (1, 3, 16):
            assert list(completions(model, [prompt], several, eos, rows)) == of_prompt
    assert list(completions(model, iter(PROMPTS), several, eos, rows=3)) == found
    fewer = Sampling(16, 1.0, seed=3, num_return_sequences=2)
    assert complete(model, PROMPTS[:1], fewer, eos) == found[:2]
    assert complete(model, PROMPTS[:1], Sampling(16, 1.0, seed=4, num_return_sequences=4), eos)[1] != found[1]


def test_the_first_draw_is_that_of_versions_without_others(model: Transformer) -> None:
    sampling = Sampling(1, 1.0, seed=3, num_return_sequences=2)
    with torch.inference_mode():
        distribution = token_distribution(model(torch.tensor([PROMPTS[2]]))[:, -1], sampling)
    firsts = {}
    for seed in range(20):
        generator = torch.Generator().manual_seed(derived_seed(seed, "sampling"))
        firsts[seed] = [int(torch.multinomial(distribution[0], 1, generator=generator))]
    found = {seed: complete(model, PROMPTS[2:3], replace(sampling, seed=seed), ())[0].ids for seed in firsts}
    assert found == firsts


@pytest.mark.parametrize(("beams", "count"), [(2, 2), (4, 3), (5, 5)])
@pytest.mark.parametrize("how", [{}, {"length_penalty": 2.0}, {"length_penalty": -0.5, "repetition_penalty": 1.3}])
def test_the_best_beams_are_those_of_transformers(
    model: Transformer, reference: Any, beams: int, count: int, how: dict[str, float]
) -> None:
    """Beams that ended early and beams that met the last length, with many EOS tokens and with none."""
    chance, reasons = random.Random(beams), set()
    for case in range(12):
        prompt = [1, *(chance.randrange(3, 131) for _ in range(chance.randrange(1, 9)))]
        likeliest = complete(model, [prompt], Sampling(6, num_beams=beams, num_return_sequences=count), ())
        met = sorted({token for made in likeliest for token in made.ids})
        eos, new = sorted(chance.sample(met, min(len(met), case % 4))), chance.choice([1, 2, 5, 9])
        reference.generation_config.eos_token_id = eos or None
        sequences = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            pad_token_id=0, max_new_tokens=new, num_beams=beams, num_return_sequences=count, **how,
        )[:, len(prompt):].tolist()  # fmt: skip
        expected = []
        for ids in sequences:
            end = next((place for place, token in enumerate(ids) if token in eos), len(ids))
            expected.append(ids[:end])
        found = complete(model, [prompt], Sampling(new, num_beams=beams, num_return_sequences=count, **how), set(eos))
        assert [made.ids for made in found] == expected, (prompt, eos, new)
        reasons |= {made.finish_reason for made in found}
    assert reasons == {"eos", "length"}


def test_more_completions_than_there_are_is_an_error(tiny_base: Callable[..., Path]) -> None:
    model = load_model(tiny_base(vocab_size=5)).eval()
    with pytest.raises(SpecError, match="only 5 completions"):
        complete(model, [[1]], Sampling(1, num_beams=8, num_return_sequences=8), {2})


@pytest.mark.parametrize("words", [("--temperature", 1.5), ("--num-beams", 3)])
def test_results_are_further_lines_with_their_sequence(
    command: Command, base: Path, tmp_path: Path, words: tuple[Any, ...]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red llama", "completion": "x"}\n{"prompt": "nine apples"}\n')
    given = ("generate", "--model", base, "--prompt-file", tmp_path / "rows.jsonl", "--max-new-tokens", 9, *words)
    done = command(*given, "--num-return-sequences", 2, "--json", "--output", tmp_path / "out.jsonl")
    assert done.code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(result["row"], result["sequence"]) for result in results] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [result["prompt"] for result in results] == ["a red llama"] * 2 + ["nine apples"] * 2
    assert [result.get("reference") for result in results] == ["x", "x", None, None]
    assert results[0]["completion_ids"] != results[1]["completion_ids"]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == results
    alone = json.loads(command(*given, "--json").stdout)["results"]
    assert [{**result, "sequence": 1} for result in alone] == results[::2]


def test_a_prompt_is_printed_once_and_a_line_stands_between_prompts(command: Command, base: Path) -> None:
    given = ["generate", "--model", base, "--prompt", "a red llama", "--prompt", "nine", "--max-new-tokens", 4]
    given += ["--temperature", 1.5, "--num-return-sequences", 2]
    texts = [result["completion"] for result in json.loads(command(*given, "--json").stdout)["results"]]
    expected = f"a red llama\n> {texts[0]}\n> {texts[1]}\n=====\nnine\n> {texts[2]}\n> {texts[3]}\n\n"
    assert command(*given).stdout.startswith(expected)


def test_both_models_answer_each_sequence(command: Command, base: Path, peft_adapter: Callable[..., Path]) -> None:
    given = ["generate", "--model", base, "--prompt", "a red llama", "--max-new-tokens", 9, "--temperature", 1.5]
    given += ["--num-return-sequences", 3, "--json"]
    alone = json.loads(command(*given).stdout)["results"]
    both = json.loads(command(*given, "--adapter", peft_adapter(base), "--compare").stdout)["results"]
    assert [result["base_completion"] for result in both] == [result["completion"] for result in alone]
    assert [result["sequence"] for result in both] == [1, 2, 3]
