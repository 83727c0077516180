"""Our forward pass against transformers', and against itself where it takes another road."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_judges import IDS, reference_logits

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import complete
from llamatune.model.initialise import drawn_weights, initialise
from llamatune.model.kv_cache import KVCache, RowCache
from llamatune.model.transformer import Transformer
from llamatune.shapes import generation_sizes
from llamatune.shapes.llama_config import LlamaConfig

SHAPES = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "every query its own keys": {"num_key_value_heads": 6},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 14},
    "other theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_transformers(tiny_base: Callable[..., Path], changes: dict[str, object]) -> None:
    base = tiny_base(**changes)
    with torch.no_grad():
        ours = load_model(base)(IDS)
    torch.testing.assert_close(ours, reference_logits(base), atol=1e-4, rtol=0)
    assert ours.std() > 0.1


@pytest.mark.parametrize(("shards", "vocabulary"), [(1, 131), (2, 132)])
def test_meta_directory_gives_the_logits_of_the_hugging_face_one(
    tiny_base: Callable[..., Path], meta_copy: Callable[..., Path], shards: int, vocabulary: int
) -> None:
    base = tiny_base(vocab_size=vocabulary)
    with torch.no_grad():
        torch.testing.assert_close(load_model(meta_copy(base, shards))(IDS), load_model(base)(IDS), atol=1e-6, rtol=0)


def test_bf16_stays_close_to_fp32(tiny_base: Callable[..., Path]) -> None:
    base = tiny_base()
    with torch.no_grad():
        ours = load_model(base, torch.bfloat16)(IDS).float()
    reference = reference_logits(base)
    assert (ours - reference).norm() / reference.norm() < 0.03


def test_right_padding_changes_no_real_position(tiny_base: Callable[..., Path]) -> None:
    model = load_model(tiny_base())
    padded = torch.cat((IDS, torch.zeros(2, 5, dtype=torch.int64)), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded)[:, : IDS.shape[1]], model(IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_cached_decoding_is_full_decoding(tiny_base: Callable[..., Path], changes: dict[str, object]) -> None:
    """Seven tokens at once, then one at a time."""
    model = load_model(tiny_base(**changes))
    for ids in IDS.split(1):
        cache = KVCache(model.config, ids.shape[1], torch.float32, model.device)
        with torch.no_grad():
            parts = [model(ids[:, :7], cache=cache)]
            parts += [model(ids[:, t : t + 1], cache=cache) for t in range(7, ids.shape[1])]
            torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=0)
        assert cache.length == ids.shape[1]


@pytest.mark.parametrize("fixed", [False, True], ids=["", "the whole room is seen"])
@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 5}], ids=["llama", "window"])
def test_rows_of_their_own_lengths_are_decoded_as_alone(
    tiny_base: Callable[..., Path], changes: dict[str, object], fixed: bool
) -> None:
    """Two sequences are read in one pass, go on by a token each, and one gives its row to a third."""
    model, chance = load_model(tiny_base(**changes)), torch.Generator().manual_seed(1)
    first, second, third = (torch.randint(131, (1, length), generator=chance) for length in (9, 20, 14))
    cache = RowCache(model.config, 2, torch.float32, model.device)

    def next_logits(*columns: torch.Tensor) -> torch.Tensor:
        places = torch.tensor(cache.lengths)
        if fixed:
            cache.grow()
            layers, mask = cache.fixed_step(places)
            cache.go_on()
            assert mask.shape == (2, 1, 1, cache.room)
        else:
            layers, mask = cache.next_token(places)
        logits: torch.Tensor = model(torch.cat(columns), places[:, None], mask, layers)
        return logits[:, 0]

    with torch.no_grad():
        read = model(torch.cat((first[:, :4], second[:, :13]), dim=1), cache=cache.begin([4, 13]), lengths=(4, 13))
        alone = [model(ids)[0] for ids in (first, second, third)]
        torch.testing.assert_close(read[0], torch.cat((alone[0][:4], alone[1][:13])), atol=1e-5, rtol=0)
        for step in range(5):
            logits = next_logits(first[:, 4 + step :][:, :1], second[:, 13 + step :][:, :1])
            expected = torch.stack((alone[0][4 + step], alone[1][13 + step]))
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert cache.drop([0]) == [1], "the second sequence takes the first row"
        model(third[:, :10], cache=cache.begin([10]), lengths=(10,))
        for step in range(2):
            logits = next_logits(second[:, 18 + step :][:, :1], third[:, 10 + step :][:, :1])
            expected = torch.stack((alone[1][18 + step], alone[2][10 + step]))
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_cache_takes_the_room_that_is_used(tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives, grown and cut, what one that was made large enough at once gives, bit by bit."""
    model, chance = load_model(tiny_base()), torch.Generator().manual_seed(1)
    ids = torch.randint(131, (1, 90), generator=chance)

    def decode(capacity: int) -> torch.Tensor:
        cache = KVCache(model.config, capacity, torch.float32, model.device)
        parts = [model(ids[:, :7], cache=cache)]
        for t in range(7, 90):
            parts.append(model(ids[:, t : t + 1], cache=cache))
            if t == 61:
                cache.keep_places(torch.arange(t + 1))
        assert cache.length == 90
        held = sum(stored.shape[3] for stored in cache._stored) / len(cache._stored)
        assert held <= min(capacity, 2 * max(90, generation_sizes.FIRST_ROOM_TOKENS))
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        at_once = decode(90)
        monkeypatch.setattr(generation_sizes, "FIRST_ROOM_TOKENS", 1)
        for capacity in (90, 91, 1 << 40):  # the last would be more than any machine has
            assert torch.equal(decode(capacity), at_once)


def test_truncated_model_is_the_first_blocks(tiny_base: Callable[..., Path]) -> None:
    from transformers import LlamaForCausalLM

    base = tiny_base()
    reference = LlamaForCausalLM.from_pretrained(base)
    reference.model.layers = reference.model.layers[:2]
    with torch.no_grad():
        ours = load_model(base, num_layers=2)
        torch.testing.assert_close(ours(IDS), reference(IDS, use_cache=False).logits, atol=1e-4, rtol=0)
    assert len(ours.model.layers) == 2


def test_weights_may_be_drawn_where_they_will_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a generator of that device; on ``meta``, which has none, only where they lie is seen."""
    asked = []

    def generator(device: Any) -> torch.Generator:
        asked.append(torch.device(device))
        return torch._C.Generator()

    with torch.device("meta"):
        model = Transformer(LlamaConfig(48, 100, 2, 6, 2, 131))
    monkeypatch.setattr(torch, "Generator", generator)
    drawn = dict(drawn_weights(model, 3, device="meta"))
    assert asked == [torch.device("meta")]
    assert {(x.device.type, x.dtype) for x in drawn.values()} == {("meta", torch.float32)}


def test_weights_drawn_from_a_seed_are_the_same_each_time_and_others_for_another() -> None:
    config = LlamaConfig(48, 100, 2, 6, 2, 131)
    drawn = []
    for seed in (4, 4, 5):
        model = Transformer(config)
        torch.rand(7)  # the global generator has no say
        initialise(model, seed)
        drawn.append(model.state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    matrices = [name for name in drawn[0] if drawn[0][name].dim() == 2]
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in matrices)
    assert all(abs(float(drawn[0][name].std()) - 0.02) < 0.001 for name in matrices)
    assert all(bool((drawn[0][name] == 1).all()) for name in drawn[0].keys() - set(matrices))


# The real pretrained model.


@pytest.mark.parametrize("directory", ["stories260K-hf", "stories260K-meta"])
def test_real_logits_are_those_of_transformers(shared_fixtures: Path, directory: str) -> None:
    ids = torch.randint(3, 500, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_model(shared_fixtures / directory)(ids)
    torch.testing.assert_close(ours, reference_logits(shared_fixtures / "stories260K-hf", ids), atol=1e-4, rtol=0)


def test_real_directories_of_both_formats_give_the_same_logits(shared_fixtures: Path) -> None:
    ids = torch.randint(3, 500, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hf, meta = (load_model(shared_fixtures / f"stories260K-{format_}")(ids) for format_ in ("hf", "meta"))
    torch.testing.assert_close(hf, meta, atol=1e-5, rtol=0)


def test_real_greedy_text_of_200_tokens_is_that_of_transformers(shared_fixtures: Path) -> None:
    from transformers import LlamaForCausalLM

    base = shared_fixtures / "stories260K-hf"
    prompt = [1, 403, 407, 261, 378]
    reference = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference.generation_config.eos_token_id = None  # 200 tokens, whatever it says
    expected = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=200, pad_token_id=0)
    found = complete(load_model(base), [prompt], Sampling(max_new_tokens=200, temperature=0), eos_ids=())
    assert found[0].ids == expected[0, len(prompt) :].tolist()
    assert len(found[0].ids) == 200
