"""Damage to files by kind: bytes, JSON values, lines, text, tensors, and things that are no regular file.

A mutation is a function of a ``random.Random`` and the sound bytes. Each says what it did, in one line.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

BAIT = "../bait.json"
"""A file outside of every product. Nothing may open it because a product names it."""
CONTROLS = ("\0", "\x1b[31m", "\x07", "\x85", "\x9b2J", "\u2028", "\u202e", "\u2066", "\ufeff", "\r", "\n", "\x7f")
MARKUP = ("[/bold]", "[bold red]", "[link=x]", "<script>x</script>", "{{7*7}}", "%s%n", "|`*_#", "]]>")
_RAW = {
    "\ue000nan": "NaN", "\ue000inf": "-Infinity", "\ue000big": "1e999", "\ue000digits": "7" * 5000,
    "\ue000zero": "-0", "\ue000surrogate": '"\\ud800"', "\ue000nested": "[" * 20_000 + "]" * 20_000,
    "\ue000objects": '{"a":' * 300 + "1" + "}" * 300,
}  # fmt: skip
"""What ``json.dumps`` cannot write: placeholders, and the tokens that stand for them in the file."""
_NUMBERS = (0, -1, 1, 2, 3, 7, 255, 1 << 31, (1 << 53) - 1, 1 << 53, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400)
_FRACTIONS = (0.5, -0.0, 1e-320, 1e308, -1e308, 1.0, 3.0, 1e100, -2.5)
_TEXTS = (
    "", "a", "NaN", "1", "true", "..", "/", BAIT, "../../etc/passwd", "/dev/zero", "x" * 70_000, "é" * 300, "float16",
    "q_proj", "F32", "llama", "auto", "(a+)+$", "model.safetensors", "con\\x", "~", "$HOME",
)  # fmt: skip


class Put:
    """What takes the place of the sound file; ``write`` makes it at a path where nothing stands."""

    def __init__(self, told: str, write: Callable[[Path], None], content: bytes | None = None) -> None:
        self.told, self.write, self.content = told, write, content


def put_bytes(told: str, content: bytes) -> Put:

    def write(path: Path) -> None:
        path.write_bytes(content)

    return Put(told, write, content)


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def _full_directory(path: Path) -> None:
    path.mkdir()
    (path / "x").write_text("x")


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(path.name if target == "itself" else target)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a directory": lambda path: path.mkdir(),
    "a directory with a file": _full_directory,
    "a link to itself": _link("itself"),
    "a link to nothing": _link("nowhere"),
    "a link to /dev/zero": _link("/dev/zero"),
    "a link to /dev/null": _link("/dev/null"),
    "nothing": lambda path: None,
}


def _hostile(chance: random.Random) -> Any:
    match chance.randrange(9):
        case 0 | 1:
            return chance.choice(_NUMBERS)
        case 2:
            return chance.choice(_FRACTIONS)
        case 3:
            return chance.choice(_TEXTS)
        case 4:
            return "a" + chance.choice(CONTROLS) + chance.choice(MARKUP) + "b"
        case 5:
            return chance.choice(tuple(_RAW))
        case 6:
            return chance.choice((None, True, False))
        case 7:
            return chance.choice(([], {}, [[]], [None], [1], ["a"], {"a": 1}, {"": ""}, [0] * 3000, [[1, 2], [3]]))
        case _:
            return [_hostile(chance)] if chance.random() < 0.5 else {chance.choice(_TEXTS)[:50]: _hostile(chance)}


def _near(value: Any, chance: random.Random) -> Any:
    """A value of the same kind, at the edge or a little beside."""
    if isinstance(value, (int, float)) and not abs(value) < 1e100:
        return _hostile(chance)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, value * 2, value * 1_000_003, float(value), str(value)))
    if isinstance(value, float):
        return chance.choice((-value, value * 1e300, value * 1e6, 0.0, int(value), str(value), value + 1))
    if isinstance(value, str):
        at, extra = chance.randint(0, len(value)), chance.choice((*CONTROLS, *MARKUP))
        return chance.choice((value[:at] + extra + value[at:], value[:at], value * 2, value.upper(), [value]))
    if isinstance(value, list):
        changed = list(value)
        chance.shuffle(changed)
        return chance.choice((value[1:], value * 2, changed, [*value, _hostile(chance)], value[::-1], [value]))
    if isinstance(value, dict):
        return chance.choice((list(value), list(value.values()), {**value, "more": _hostile(chance)}, {}))
    return _hostile(chance)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, node in inner:
        found.append((*path, key))
        found += _places(node, (*path, key))
    return found


def _chosen(value: Any, chance: random.Random) -> tuple[Any, ...]:
    """The place of a node. The upper ones are as likely as the many below them."""
    places = _places(value)
    if chance.random() < 0.5:
        depth = chance.choice(sorted({len(place) for place in places}))
        places = [place for place in places if len(place) == depth]
    return chance.choice(places)


def mutate_value(value: Any, chance: random.Random) -> tuple[Any, str]:
    """A copy of a JSON value with one to three of its nodes changed, and what was."""
    value = json.loads(json.dumps(value))
    told = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if not _places(value):
            break
        *above, key = _chosen(value, chance)
        holder = value
        for step in above:
            holder = holder[step]
        name, change = ".".join(map(str, (*above, key)))[:80], chance.randrange(10)
        if change < 4:
            holder[key] = _near(holder[key], chance)
            told.append(f"{name} becomes {_short(holder[key])}")
        elif change < 7:
            holder[key] = _hostile(chance)
            told.append(f"{name} becomes {_short(holder[key])}")
        elif change < 8:
            del holder[key]
            told.append(f"without {name}")
        elif isinstance(holder, dict):
            if change == 8:
                new = chance.choice((f"{key}\x1b[1m", f"{key}s", *_TEXTS[:4], f"{key}\u202e[/b]"))
                holder[new] = holder.pop(key)
                told.append(f"{name} is called {_short(new)}")
            else:
                holder["\ue001" + str(key)] = _hostile(chance)  # the same key a second time
                told.append(f"{name} comes twice")
        else:
            holder.insert(chance.randint(0, len(holder)), _hostile(chance))
            told.append(f"an element more beside {name}")
    return value, ", ".join(told) or "nothing"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def dump_mutated(value: Any) -> bytes:
    """JSON with the tokens of placeholders in their places, as bytes."""
    text = json.dumps(value, ensure_ascii=False)
    for holder, token in _RAW.items():
        text = text.replace(json.dumps(holder, ensure_ascii=False), token)
    return text.replace("\ue001", "").encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, chance: random.Random) -> Put:
    """Bits flipped, pieces cut, doubled, moved or filled; the file cut short, emptied or lengthened."""
    data, told = bytearray(content), []
    for _ in range(chance.choice((1, 1, 1, 2, 6))):
        size, length = min(chance.choice((1, 1, 2, 8, 60, 1000)), len(data)), len(data)
        if not length:
            break
        at = min(chance.randrange(length), chance.choice((length, length, 64, 600)) - 1)
        change = chance.randrange(9)
        told.append(f"{('flip', 'noise', 'cut', 'double', 'fill', 'end', 'append', 'move', 'insert')[change]} at {at}")
        if change == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            data[at : at + size] = chance.randbytes(size)
        elif change == 2:
            del data[at : at + size]
        elif change == 3:
            data[at:at] = data[at : at + size] * chance.choice((1, 3))
        elif change == 4:
            data[at : at + size] = bytes([chance.choice((0, 0x20, 0x7F, 0x80, 0xFF))]) * size
        elif change == 5:
            del data[at:]
        elif change == 6:
            data += chance.choice((b"\0", b"\n", b"{}", b"\n{", bytes(5000), data[at : at + size]))
        elif change == 7:
            data[at : at + size], data[:size] = data[:size], data[at : at + size]
        else:
            data[at:at] = chance.choice(
                (b"\0", b"\x1b[2J", b"\xff", "\u202e".encode(), b"\xe2\x80\xa8", b"\r", b"[/b]")
            )
    return put_bytes(", ".join(told) or "nothing", bytes(data))


def mutate_text(content: bytes, chance: random.Random) -> Put:
    """Lines and characters of a text changed."""
    text = content.decode("utf-8", "surrogateescape")
    at, line = chance.randint(0, len(text)), chance.randrange(max(1, text.count("\n")))
    lines = text.split("\n")
    match chance.randrange(6):
        case 0:
            extra = chance.choice(CONTROLS) * chance.choice((1, 1, 40))
            return put_bytes(f"{_short(extra)} at {at}", (text[:at] + extra + text[at:]).encode("utf-8", "replace"))
        case 1:
            extra = chance.choice(
                (*MARKUP, "9" * 5000, "[" * 30_000, '"', "'", "{", "}", ":", "#", "&a *a", "!!x", "- ")
            )
            return put_bytes(f"{_short(extra)} at {at}", (text[:at] + extra + text[at:]).encode("utf-8", "replace"))
        case 2:
            del lines[line]
            return put_bytes(f"without line {line}", "\n".join(lines).encode("utf-8", "replace"))
        case 3:
            lines[line:line] = [lines[line]] * chance.choice((1, 2, 500))
            return put_bytes(f"line {line} again", "\n".join(lines).encode("utf-8", "replace"))
        case 4:
            codec = chance.choice(("utf-16", "utf-8-sig", "utf-32", "latin-1"))
            return put_bytes(f"in {codec}", text.encode(codec, "replace"))
        case _:
            chance.shuffle(lines)
            return put_bytes("lines in another order", "\n".join(lines).encode("utf-8", "replace"))


def mutate_json(content: bytes, chance: random.Random) -> Put:
    value, told = mutate_value(json.loads(content), chance)
    return put_bytes(told, dump_mutated(value))


def mutate_lines(content: bytes, chance: random.Random) -> Put:
    """One line of a JSON Lines file changed, doubled, moved or removed."""
    lines = content.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    match chance.randrange(8):
        case 0:
            del lines[at]
            return put_bytes(f"without line {at}", b"".join(lines))
        case 1:
            lines.insert(at, lines[at])
            return put_bytes(f"line {at} twice", b"".join(lines))
        case 2:
            chance.shuffle(lines)
            return put_bytes("lines in another order", b"".join(lines))
        case 3:
            lines.insert(at, dump_mutated(_hostile(chance)) + b"\n")
            return put_bytes(f"a line before line {at}", b"".join(lines))
        case _:
            value, told = mutate_value(json.loads(lines[at]), chance)
            lines[at] = dump_mutated(value) + b"\n"
            return put_bytes(f"line {at}: {told}", b"".join(lines))


def mutate_yaml(content: bytes, chance: random.Random) -> Put:
    """A YAML mapping with values changed, written as JSON, which is YAML, or in YAML's own way."""
    value, told = mutate_value(yaml.safe_load(content), chance)
    return put_bytes(told, dump_mutated(value))


_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
           "F8_E4M3": 1, "U32": 4, "F4": 1, "C64": 8}  # fmt: skip


def mutate_safetensors(content: bytes, chance: random.Random) -> Put:
    """The header changed as JSON, or tensors changed so that header and bytes fit each other."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if chance.random() < 0.4:
        value, told = mutate_value(header, chance)
        text = dump_mutated(value)
        stated = len(text) + chance.choice((0, 0, 0, 0, 0, 1, -1, 1 << 40, (1 << 63) - len(text)))
        return put_bytes(f"header: {told}", struct.pack("<Q", stated) + text + data)
    tensors = {name: [entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]]
               for name, entry in header.items() if name != "__metadata__"}  # fmt: skip
    told = [_change_tensor(tensors, chance) for _ in range(chance.choice((1, 1, 2, 4)))]
    rebuilt, parts, end = {}, [], 0
    if "__metadata__" in header:
        rebuilt["__metadata__"] = header["__metadata__"]
    for name, (dtype, shape, stored) in tensors.items():
        rebuilt[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(stored)]}
        parts.append(stored)
        end += len(stored)
    text = dump_mutated(rebuilt)
    text += b" " * (-len(text) % 8)
    return put_bytes(", ".join(told), struct.pack("<Q", len(text)) + text + b"".join(parts))


def _change_tensor(tensors: dict[str, list[Any]], chance: random.Random) -> str:
    if not tensors:
        return "no tensor left"
    name = chance.choice(sorted(tensors))
    dtype, shape, data = tensors[name]
    width = _DTYPES.get(dtype, 1)
    count = len(data) // width
    match chance.randrange(10):
        case 0:
            del tensors[name]
            return f"without {name}"
        case 1:
            new = chance.choice((f"{name}.more", f"{name}\x1b[31m", "a", "../x", name.upper(), name.replace("0", "7")))
            tensors[new] = tensors.pop(name)
            return f"{name} is called {_short(new)}"
        case 2:
            tensors[chance.choice((f"{name}2", "more", "é\u202e"))] = [dtype, shape, data]
            return f"{name} again under another name"
        case 3:
            tensors[name][1] = chance.choice(([count], [1, count], [count, 1], [*shape, 1], shape[::-1], [1, *shape]))
            return f"{name} of shape {tensors[name][1]}"
        case 4:
            rows = max(0, (shape[0] if shape else 1) + chance.choice((-1, 1, -1000, 5)))
            size = width * rows * (count // max(1, shape[0]) if shape else 1)
            tensors[name][1:] = [[rows, *shape[1:]], (data * (size // max(1, len(data)) + 1))[:size]]
            return f"{name} of {rows} rows"
        case 5:
            other = chance.choice(
                [kind for kind, size in _DTYPES.items() if size == width and kind != dtype] or ["F32"]
            )
            tensors[name][0] = other
            return f"{name} as {other}"
        case 6:
            tensors[name][1:] = [[0], b""]
            return f"{name} is empty"
        case _:
            tensors[name][2] = _change_values(dtype, data, width, chance)
            return f"other values in {name}"


def _change_values(dtype: str, data: bytes, width: int, chance: random.Random) -> bytes:
    """One element, a few or all of them replaced."""
    if dtype in ("F32", "F16", "BF16", "F64"):
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[dtype]
        value = chance.choice((float("nan"), float("inf"), -float("inf"), 1e38, -3e38, 1e-40, 0.0, 6e4))
        stored = torch.tensor([value], dtype=torch.float64).to(kind).view(torch.uint8).numpy().tobytes()
    else:
        value = chance.choice((0, 1, 2, -1, 131, 132, 5000, (1 << 31) - 1, -(1 << 31), 1 << 40, (1 << 63) - 1))
        stored = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    changed, count = bytearray(data), len(data) // width
    for at in chance.sample(range(count), min(count, chance.choice((1, 1, 3, count)))):
        changed[at * width : (at + 1) * width] = stored
    return bytes(changed)


def mutate_archive(content: bytes, chance: random.Random) -> Put:
    """A torch archive with other tensors, or with something else than tensors in it."""
    tensors = torch.load(io.BytesIO(content), weights_only=True)
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    match chance.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensor.to(chance.choice((torch.float16, torch.float64, torch.int64, torch.bool)))
        case 2:
            tensors[name] = chance.choice((tensor[:-1], tensor[None], tensor.flatten(), tensor[:0], tensor.t()))
        case 3:
            tensors[name] = chance.choice((None, 7, "x", [tensor], {"a": tensor}, torch.Size([1]), tensor.tolist()[0]))
        case 4:
            tensors[chance.choice(("more", "a\x1b[31m", f"{name}\u202e", "", "é"))] = tensor
        case 5:
            tensors = chance.choice(([tensors], {"model": tensors}, {"state_dict": tensors, "epoch": 3}, None, tensor))
        case _:
            tensor = tensor.clone()
            tensor.view(-1)[chance.randrange(max(1, tensor.numel()))] = chance.choice(
                (float("nan"), float("inf"), 1e38)
            )
            tensors[name] = tensor
    out = io.BytesIO()
    torch.save(tensors, out)
    return put_bytes(f"{name} changed", out.getvalue())


KINDS: dict[str, Callable[[bytes, random.Random], Put]] = {
    "json": mutate_json, "lines": mutate_lines, "yaml": mutate_yaml, "text": mutate_text,
    "safetensors": mutate_safetensors, "archive": mutate_archive, "bytes": mutate_bytes,
}  # fmt: skip
_TEXT_KINDS = ("json", "lines", "yaml")


@dataclass(frozen=True)
class Mutation:
    """A mutation by number; ``redigested``: the manifest beside is made to fit."""

    put: Put
    redigested: bool


def mutation(file: str, kind: str, content: bytes, number: int, seed: int) -> Mutation:
    """The ``number``-th mutation of a file: a function of seed, name and sound bytes alone."""
    chance = random.Random(f"{seed} {file} {number}")
    redigested, drawn = chance.random() < 0.5, chance.random()
    if drawn > 0.98:
        told = chance.choice(sorted(SPECIAL))
        return Mutation(Put(f"{told} in its place", SPECIAL[told]), redigested)
    if drawn < 0.15:
        return Mutation(mutate_bytes(content, chance), redigested)
    if drawn < 0.22 and kind in _TEXT_KINDS:
        return Mutation(mutate_text(content, chance), redigested)
    return Mutation(KINDS[kind](content, chance), redigested)


def redigest(product: Path, name: str, content: bytes) -> None:
    """Let the manifest of a product fit the new content of one of its files."""
    path = product / "llamatune.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.pop("sha256", None)  # of the manifest itself
    path.write_text(json.dumps(manifest))


TEXT_OF_LOCK = b'{"host": "node-7", "pid": 4194304, "started": "2026-01-01T00:00:00+0000"}'
"""A note that a killed process left in a run's lock."""
