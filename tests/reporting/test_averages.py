"""Running averages and epoch means against closed forms."""

from __future__ import annotations

import numpy
import pytest
from report_material import falling, make_steps, noisy

from llamatune.reporting.averages import decay_for, epoch_means, running_average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_the_running_average_is_the_weighted_mean_of_its_definition(decay: float) -> None:
    values = noisy(falling(30), 0.3)
    for count, average in enumerate(running_average(values, decay), 1):
        weights = [decay ** (count - 1 - place) for place in range(count)]
        assert average == pytest.approx(sum(w * x for w, x in zip(weights, values, strict=False)) / sum(weights))
    assert running_average([7.0] * 5, decay) == pytest.approx([7.0] * 5)


def test_epoch_means_weigh_target_tokens_and_take_the_last_evaluation_of_the_epoch() -> None:
    steps = make_steps([4.0, 2.0, 1.0, 1.0, 0.5], epochs=1)
    shares = (0.5, 1.0, 1.5, 2.0, 2.5)
    tokens = (30, 10, 10, 10, 7)
    steps = [
        type(step)(**{**vars(step), "epoch": epoch, "target_tokens": count})
        for step, epoch, count in zip(steps, shares, tokens, strict=True)
    ]
    first, second, third = epoch_means(steps, {1: 9.0, 2: 8.0, 3: 7.0})
    assert (first.train_loss, first.validation_loss, first.steps) == (pytest.approx(140 / 40), 8.0, 2)
    assert (second.train_loss, second.validation_loss, second.complete) == (1.0, 7.0, True)
    assert (third.epoch, third.complete, third.validation_loss, third.target_tokens) == (3, False, None, 7)
    assert first.train_perplexity == pytest.approx(numpy.exp(3.5))


def test_the_decay_follows_the_length_and_the_average_ends_where_the_updates_do() -> None:
    """The decays of LLaMA-Factory's sigmoid; its average is ours without the correction of the start."""
    decays = [round(decay_for(count), 4) for count in (0, 1, 20, 69, 200, 10**9)]
    assert decays == [0, 0.0225, 0.4159, 0.8446, 0.8999, 0.9]
    losses = noisy([5.0 - place / 40 for place in range(69)], 0.05)
    last = sum(losses[-10:]) / 10
    assert running_average(losses, decay_for(69))[-1] == pytest.approx(last, rel=0.02)
    assert running_average(losses, 0.95)[-1] > 1.03 * last
