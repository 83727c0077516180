"""The dtypes of ``shapes.dtypes`` as torch has them."""

from __future__ import annotations

import torch

from llamatune.shapes.dtypes import DTYPES, WEIGHT_DTYPES

DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, dtype.name): dtype.name for dtype in DTYPES}
"""``bfloat16`` for ``torch.bfloat16``."""
STORED_NAMES: dict[torch.dtype, str] = {getattr(torch, dtype.name): dtype.stored for dtype in DTYPES}
"""safetensors' name of each dtype."""
TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_DTYPES}
"""The dtypes of weights by the names that ``--dtype`` and ``model.dtype`` use."""
STORED_WEIGHTS = {STORED_NAMES[dtype]: dtype for dtype in TORCH_DTYPES.values()}
"""The dtypes of weights by safetensors' names."""
