"""Two folders compared byte for byte, times and measured memory aside, and the first difference put into words.

What is not compared is this short list and nothing else. Where a value is left out, its key, its place and whether it
is a number or null are still compared, since only its digits are replaced.

- values of ``TIMES``, ``MEASURED_MEMORY`` and ``POWER``, and the version of llamatune in a checkpoint's ``state.json``;
- in ``state.json``, how long ``metrics.jsonl`` was: times have more or fewer digits. The lines up to there are counted
  in its place;
- in a checkpoint's manifest, size and SHA-256 of ``state.json``, which holds times;
- the folder's own path, which reads as ``.``;
- the lock of a run, which says who held it last.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMES = ("began_s", "checkpoint_s", "elapsed_s", "epoch_s", "evaluation_s", "runtime_s", "seconds",
         "tokens_per_second", "training_s")  # fmt: skip
MEASURED_MEMORY = ("memory_before_model_bytes", "peak_device_memory_bytes", "peak_memory_bytes")
POWER = ("energy_j", "mean_power_w", "metered_s", "peak_power_w")
LOCK = ".llamatune.lock"
STATE, LOG, MANIFEST = "state.json", "metrics.jsonl", "llamatune.json"

_STATE_ENTRY = re.compile(rb'("state\.json": \{\s*"bytes": )\d+(,\s*"sha256": ")[0-9a-f]{64}"')
_METRICS_BYTES = re.compile(rb'("metrics_bytes": )(\d+)')
_VERSION = re.compile(rb'("llamatune": ")[^"]*"')
_LONGEST_QUOTE = 60


@dataclass(frozen=True)
class Compared:
    """How much was compared, counted on the first side; ``difference`` None: all of it is equal."""

    files: int
    bytes: int
    difference: str | None


def compare_folders(before: Path, after: Path, roots: tuple[Path, Path], unstable: tuple[str, ...] = ()) -> Compared:
    """Compare every file below two folders.

    Args:
        roots: what each side's own path begins with, where a file tells it.
        unstable: further keys of JSON whose numbers are left out.
    """
    found, expected = _names(after), _names(before)
    size = sum((before / name).stat().st_size for name in expected)
    differing = [f"{name}: only before" for name in expected if name not in found]
    differing += [f"{name}: only after" for name in found if name not in expected]
    for name in sorted(set(expected) & set(found), key=_order):
        contents = [comparable(side / name, root, unstable) for side, root in zip((before, after), roots, strict=True)]
        if contents[0] != contents[1]:
            differing.append(f"{name}: {describe(name, *contents)}")
    more = f" (and {len(differing) - 1} more files)" if len(differing) > 1 else ""
    return Compared(len(expected), size, differing[0] + more if differing else None)


def _names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() and path.name != LOCK
    )


def _order(name: str) -> tuple[bool, bool, str]:
    """Metrics first, since they say where a run went another way; manifests last, since they only repeat digests."""
    return name.endswith(MANIFEST), not name.endswith(".jsonl"), name


def comparable(path: Path, root: Path, unstable: tuple[str, ...] = ()) -> bytes:
    """The bytes of a file; of JSON those that two equal runs share, still JSON."""
    content = path.read_bytes()
    if path.suffix not in (".json", ".jsonl"):
        return content
    keys = "|".join((*TIMES, *MEASURED_MEMORY, *POWER, *unstable)).encode()
    content = re.sub(rb'("(?:' + keys + rb')": )-?\d[0-9.eE+-]*', rb"\g<1>0", content)
    content = content.replace(os.fsencode(root), b".")
    if path.name == STATE:
        log = (path.parents[2] / LOG).read_bytes()
        content = _METRICS_BYTES.sub(lambda match: match[1] + b"%d" % _lines(log, int(match[2])), content)
        content = _VERSION.sub(rb'\1"', content)
    return _STATE_ENTRY.sub(rb'\g<1>0\2"', content)


def _lines(log: bytes, length: int) -> int:
    """Whole lines in the first ``length`` bytes; -1 if they end inside one, or beyond the log."""
    torn = length > len(log) or (length > 0 and log[length - 1 : length] != b"\n")
    return -1 if torn else log[:length].count(b"\n")


def describe(name: str, before: bytes, after: bytes) -> str:
    """Where two contents of a file first differ: the tensor, the JSON key, or the byte."""
    described = None
    try:
        if name.endswith(".safetensors"):
            described = _tensor_difference(before, after)
        elif name.endswith(".json"):
            described = _value_difference(json.loads(before), json.loads(after))
        elif name.endswith(".jsonl"):
            described = _line_difference(before.splitlines(), after.splitlines())
    except (ValueError, LookupError, TypeError, AttributeError):
        pass  # not what its name says: the byte is told
    if described is not None:
        return described
    pairs = enumerate(zip(before, after, strict=False))
    place = next((index for index, (a, b) in pairs if a != b), min(len(before), len(after)))
    return f"byte {place:,}, line {before[:place].count(10) + 1:,} ({len(before):,} and {len(after):,} bytes)"


def _tensor_difference(before: bytes, after: bytes) -> str | None:
    (header, data), (other_header, other_data) = _parts(before), _parts(after)
    difference = _value_difference(header.pop("__metadata__", None), other_header.pop("__metadata__", None))
    if difference is not None:
        return f"metadata: {difference}"
    for name, entry in header.items():
        if name not in other_header:
            return f"tensor {name}: only before"
        other = other_header[name]
        for key in ("dtype", "shape"):
            if entry[key] != other[key]:
                return f"tensor {name}: {key} {entry[key]} became {other[key]}"
        values, others = data[slice(*entry["data_offsets"])], other_data[slice(*other["data_offsets"])]
        if values != others:
            count = sum(a != b for a, b in zip(values, others, strict=True))
            return f"tensor {name}: {count:,} of {len(values):,} bytes differ"
    added = [name for name in other_header if name not in header]
    return f"tensor {added[0]}: only after" if added else "layout of the header"


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _line_difference(before: list[bytes], after: list[bytes]) -> str | None:
    for number, (line, other) in enumerate(zip(before, after, strict=False), 1):
        if line != other:
            return f"line {number}: {_value_difference(json.loads(line), json.loads(other)) or 'spelling'}"
    return f"{len(before)} lines became {len(after)}" if len(before) != len(after) else None


def _value_difference(before: Any, after: Any, where: str = "") -> str | None:
    """The first key or element of JSON values that differs; None if only their spelling does."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in (*before, *after):
            if name not in after or name not in before:
                return f"{where}.{name}: only {'before' if name in before else 'after'}"
        parts = [(f"{where}.{name}", before[name], after[name]) for name in before]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        parts = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(before, after, strict=True))]
    else:
        same = type(before) is type(after) and before == after
        return None if same else f"{where or 'value'}: {_quoted(before)} became {_quoted(after)}"
    return next(filter(None, (_value_difference(a, b, place) for place, a, b in parts)), None)


def _quoted(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "..."
