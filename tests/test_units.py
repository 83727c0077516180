"""Sizes and durations as text."""

import pytest

from llamatune.units import clock_duration, gibibytes


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0.0 KiB"), (512, "0.5 KiB"), (16384, "16.0 KiB"), (1 << 20, "1.0 MiB"), ((1 << 20) - 1, "1024.0 KiB"),
        (1 << 30, "1.00 GiB"), (13476831232, "12.55 GiB"),
    ],
)  # fmt: skip
def test_a_small_size_is_not_nothing(size: int, shown: str) -> None:
    assert gibibytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599.4, "0:59:59"), (3600, "1:00:00"), (26 * 3600 + 62, "26:01:02")],
)
def test_the_time_left_is_hours_minutes_and_seconds(seconds: float, shown: str) -> None:
    assert clock_duration(seconds) == shown
