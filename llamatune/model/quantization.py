"""The kinds of quantisation by their names in ``model.dtype`` and ``--dtype``."""

from __future__ import annotations

from llamatune.model.float8 import Float8Weight
from llamatune.model.int8 import Int8Weight
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import PackedWeight

QUANTIZATIONS: dict[str, type[PackedWeight]] = {"nf4": NF4Weight, "float8": Float8Weight, "int8": Int8Weight}
"""Those of ``shapes.dtypes.QUANTIZED_DTYPES``."""
