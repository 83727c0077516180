"""What oneDNN keeps of products of many sizes, and what it and MKL are told of that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llamatune.math_library_variables import prepare_math_libraries

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_GROWTH = """
import torch
from llamatune.host_memory import held_host_bytes
from llamatune.math_library_variables import prepare_math_libraries
prepare_math_libraries()
W = torch.randn(300, 96).bfloat16()
torch.nn.functional.linear(torch.randn(2, 96).bfloat16(), W)
before = held_host_bytes()["resident"]
for rows in range(3, 259):
    torch.nn.functional.linear(torch.randn(rows, 96).bfloat16(), W)
print(held_host_bytes()["resident"] - before)
"""


def test_without_amx_a_number_is_set_unless_the_user_did(amx: bool) -> None:
    environment = {NAMES[0]: "7"}
    prepare_math_libraries(environment)
    if amx:
        assert environment == {NAMES[0]: "7"}
    else:
        assert environment == {NAMES[0]: "7", NAMES[1]: "1", "MKL_DISABLE_FAST_MM": "1"}


def test_products_of_many_sizes_keep_less_memory(amx: bool) -> None:
    """Of a process that is told the number, and of one that is told oneDNN's own."""
    if amx:
        pytest.skip("code of products is kept with AMX")
    environment = {name: text for name, text in os.environ.items() if name not in NAMES}
    prepared: dict[str, str] = {}
    prepare_math_libraries(prepared)
    kept, every = (
        int(
            subprocess.run(
                [sys.executable, "-c", _GROWTH], env=environment | more, capture_output=True, check=True
            ).stdout
        )
        for more in (prepared, dict.fromkeys(NAMES, "1024"))
    )
    if every < 50 << 20:
        pytest.skip("this processor has no products in 16 bits that oneDNN compiles")
    assert kept < every / 2
