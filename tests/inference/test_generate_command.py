"""``llamatune generate`` as scripts and people use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.spec import build_spec
from llamatune.training.train import train

Command = Callable[..., Any]
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base()


@pytest.fixture(scope="module")
def adapter(base: Path, peft_adapter: Callable[..., Path]) -> Path:
    return peft_adapter(base)


def _results(outcome: Any) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.stderr
    results: list[dict[str, Any]] = json.loads(outcome.stdout)["results"]
    return results


def test_json_holds_the_keys_that_scripts_rely_on(command: Command, base: Path) -> None:
    outcome = command("generate", "--model", base, "--prompt", "a red llama", "--prompt", "nine", *GREEDY, "--json")
    found = json.loads(outcome.stdout)
    assert found["tokens_per_second"] > 0
    assert [result["prompt"] for result in found["results"]] == ["a red llama", "nine"]
    assert all(
        result.keys() == {"prompt", "completion", "completion_ids", "finish_reason"} for result in found["results"]
    )
    assert outcome.stdout.count("\n") == 1


def test_the_text_is_that_of_transformers_and_of_the_tokenizer_itself(command: Command, base: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    prompt = [1, *tokenizer.encode("a red llama walks")]
    reference = LlamaForCausalLM.from_pretrained(base)
    ids = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0].tolist()
    new = ids[len(prompt) :]
    new = new[: new.index(2)] if 2 in new else new
    (result,) = _results(command("generate", "--model", base, "--prompt", "a red llama walks", *GREEDY, "--json"))
    assert result["completion_ids"] == new
    pieces = [i for i in [*prompt[1:], *new] if i < tokenizer.vocab_size() and not tokenizer.is_control(i)]
    assert result["prompt"] + result["completion"] == tokenizer.decode(pieces)


def test_human_output_is_the_prompt_and_then_the_completion(command: Command, base: Path) -> None:
    (result,) = _results(command("generate", "--model", base, "--prompt", "a red llama", *GREEDY, "--json"))
    outcome = command("generate", "--model", base, "--prompt", "a red llama", *GREEDY)
    assert outcome.stdout.startswith(f"a red llama\n> {result['completion']}\n")


def test_piped_stdin_is_one_prompt(command: Command, base: Path) -> None:
    (piped,) = _results(command("generate", "--model", base, *GREEDY, "--json", stdin="a red llama\n"))
    (given,) = _results(command("generate", "--model", base, "--prompt", "a red llama", *GREEDY, "--json"))
    assert piped == given


def test_no_prompt_at_all_is_a_usage_error(command: Command, base: Path) -> None:
    outcome = command("generate", "--model", base, "--json", stdin="")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: no prompt")
    assert outcome.stderr.count("\n") == 1


def test_a_prompt_file_holds_one_prompt_a_line_or_rows(command: Command, base: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a red llama\n\nnine apples\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red llama"}\n{"prompt": "nine apples"}\n')
    found = [_results(command("generate", "--model", base, "--prompt-file", tmp_path / name, *GREEDY, "--json"))
             for name in ("lines.txt", "rows.jsonl")]  # fmt: skip
    assert found[0] == found[1]
    assert [result["prompt"] for result in found[0]] == ["a red llama", "nine apples"]


def test_output_holds_one_result_a_line(command: Command, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    outcome = command(
        "generate", "--model", base, "--prompt", "a", "--prompt", "nine", *GREEDY, "--json", "--output", file
    )
    assert [json.loads(line) for line in file.read_text().splitlines()] == _results(outcome)
    before = file.read_bytes()
    words = ("generate", "--model", base, "--prompt", "red", *GREEDY, "--output", file)
    refused = command(*words)
    assert (refused.code, refused.stdout, file.read_bytes()) == (5, "", before)
    assert command(*words, "--overwrite").code == 0
    assert json.loads(file.read_text())["prompt"] == "red"


def test_an_output_that_appears_while_it_works_is_left_alone(
    command: Command, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamatune.inference import generate

    file, completions = tmp_path / "out.jsonl", generate.completions_by_model

    def meanwhile(*given: Any) -> Any:
        file.write_text("mine")
        return completions(*given)

    monkeypatch.setattr(generate, "completions_by_model", meanwhile)
    refused = command("generate", "--model", base, "--prompt", "red", *GREEDY, "--output", file)
    assert (refused.code, file.read_text()) == (5, "mine")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("prompts", "new", "warning"),
    [
        (("a red llama",), 12, None),
        (("a red llama",), 256, "tokens and up to 256 new ones can become more than the 256 tokens the model knows"),
        (("a", "a red llama " * 99), 1, "1 of 2 prompts have more than the 256 tokens the model knows, the longest "),
    ],
)
@pytest.mark.parametrize("beams", [1, 2])
def test_beyond_the_models_context_there_is_one_warning(
    command: Command, base: Path, adapter: Path, prompts: tuple[str, ...], new: int, warning: str | None, beams: int
) -> None:
    """Also where two models are asked."""
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    if beams == 1:
        words += ["--adapter", adapter, "--compare"]
    done = command("generate", "--model", base, *words, "--max-new-tokens", new, "--num-beams", beams)
    assert done.code == 0
    told = [line for line in done.stderr.splitlines() if " warning: " in line and "the model knows" in line]
    assert len(told) == (warning is not None)
    assert warning is None or warning in told[0]


def test_compare_shows_the_base_beside_the_tuned_model(command: Command, base: Path, adapter: Path) -> None:
    plain = _results(command("generate", "--model", base, "--prompt", "a red llama", *GREEDY, "--json"))
    tuned = _results(
        command("generate", "--model", base, "--adapter", adapter, "--prompt", "a red llama", *GREEDY, "--json")
    )
    both = _results(
        command(
            "generate", "--model", base, "--adapter", adapter, "--prompt", "a red llama", *GREEDY, "--json", "--compare"
        )
    )
    assert plain[0]["completion"] != tuned[0]["completion"]
    assert both == [{**tuned[0], "base_completion": plain[0]["completion"]}]
    human = command("generate", "--model", base, "--adapter", adapter, "--prompt", "a red llama", *GREEDY, "--compare")
    assert human.code == 0
    assert "base" in human.stdout


def test_compare_without_an_adapter_is_a_usage_error(command: Command, base: Path) -> None:
    outcome = command("generate", "--model", base, "--prompt", "a", "--compare")
    assert (outcome.code, outcome.stdout) == (2, "")


def test_sampled_text_is_a_function_of_the_seed_alone(command: Command, base: Path) -> None:
    def ids(seed: int, *prompts: str) -> list[list[int]]:
        given = [part for prompt in prompts for part in ("--prompt", prompt)]
        return [result["completion_ids"] for result in _results(
            command("generate", "--model", base, *given, "--seed", seed, "--temperature", 1.5, "--json"))]  # fmt: skip

    assert ids(1, "a", "nine apples") == ids(1, "a", "nine apples")
    assert ids(1, "a", "nine apples")[1] == ids(1, "nine apples")[0]
    assert ids(1, "a") != ids(2, "a")


def test_a_merged_model_says_what_its_adapter_says(command: Command, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_lora(MergeOptions(base, adapter, tmp_path / "merged"))
    prompts = ("--prompt", "a red llama", "--prompt", "cold rain falls")
    unmerged = _results(command("generate", "--model", base, "--adapter", adapter, *prompts, *GREEDY, "--json"))
    assert _results(command("generate", "--model", tmp_path / "merged", *prompts, *GREEDY, "--json")) == unmerged


def test_the_template_of_training_comes_with_the_adapter_and_the_merged_model(
    command: Command, base: Path, tmp_path: Path
) -> None:
    """A template of one's own; --template none takes it off again."""
    (tmp_path / "template.yaml").write_text('prompt: "{instruction} and:"\n')
    rows = [{"instruction": f"nine {word}", "output": "red"} for word in ("apples", "stones", "hills")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data(
        PrepareOptions([tmp_path / "rows.jsonl"], base, tmp_path / "data", template=str(tmp_path / "template.yaml"))
    )
    spec = {
        "model": {"path": str(base), "dtype": "float32"},
        "lora": {"r": 2, "alpha": 4},
        "data": {"train": str(tmp_path / "data")},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "precision": "fp32", "device": "cpu"},
    }
    train(build_spec(spec, "test"))
    trained = tmp_path / "run" / "adapter"
    merge_lora(MergeOptions(base, trained, tmp_path / "merged"))
    one = ("--prompt", "seven hills", *GREEDY, "--json")
    stored = _results(command("generate", "--model", base, "--adapter", trained, *one))
    merged = _results(command("generate", "--model", tmp_path / "merged", *one))
    assert stored[0]["prompt"] == merged[0]["prompt"] == "seven hills and:"
    without = _results(command("generate", "--model", base, "--adapter", trained, *one, "--template", "none"))
    assert without[0]["prompt"] == "seven hills"
    alpaca = _results(command("generate", "--model", base, "--adapter", trained, *one, "--template", "alpaca"))
    assert alpaca[0]["prompt"].endswith("### Response:")
    assert "seven hills" in alpaca[0]["prompt"]


def test_real_text_is_that_of_transformers(command: Command, shared_fixtures: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    base = shared_fixtures / "stories260K-hf"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    prompt = [1, *tokenizer.encode("Once upon a time")]
    ids = LlamaForCausalLM.from_pretrained(base).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60)
    for directory in ("stories260K-hf", "stories260K-meta"):
        (result,) = _results(command(
            "generate", "--model", shared_fixtures / directory, "--prompt", "Once upon a time", "--temperature", 0,
            "--max-new-tokens", 60, "--json"))  # fmt: skip
        assert result["completion_ids"] == ids[0, len(prompt) :].tolist()
        assert "Once upon a time" + result["completion"] == tokenizer.decode(ids[0, 1:].tolist())


def test_a_model_without_a_tokenizer_says_what_to_do_about_it(command: Command, base: Path, tmp_path: Path) -> None:
    """``generate`` has no option that names one; ``prepare-data`` has."""
    bare = tmp_path / "model"
    bare.mkdir()
    for file in base.iterdir():
        if "token" not in file.name:
            (bare / file.name).symlink_to(file)
    outcome = command("generate", "--model", bare, "--prompt", "x")
    assert outcome.code == 4
    what = f"error: no tokenizer.model or tokenizer.json in this directory: {bare}: "
    todo = "copy the model's tokenizer.model or tokenizer.json into it"
    assert outcome.stderr.splitlines()[-1] == what + todo
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    prepared = command("prepare-data", rows, "--tokenizer", bare, "--output", tmp_path / "prepared")
    assert prepared.stderr.splitlines()[-1] == f"{what}{todo}, or name it with --tokenizer"
