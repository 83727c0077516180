"""The messages of our errors as the source has them: ``…`` stands for what is filled in."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamatune import errors

PACKAGE = Path(errors.__file__).parent
FILLED = "…"


@dataclass(frozen=True)
class Raised:
    """``text`` None: it is made elsewhere, as by a function, or is another error's."""

    place: str
    kind: str
    text: str | None


def error_classes() -> dict[str, int]:
    """The exit code of each class of our tree, by its name; subclasses that other modules define too."""
    found, kinds = {}, [errors.LlamatuneError]
    while kinds:
        kind = kinds.pop()
        found[kind.__name__] = kind.exit_code
        kinds += kind.__subclasses__()
    return found


def raised() -> Iterator[Raised]:
    known = error_classes()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _assigned(tree.body)
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
        inner = {node: function for function in functions for node in ast.walk(function)}  # the innermost comes last
        for node in ast.walk(tree):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name not in known or not isinstance(node, ast.Call) or not node.args:
                continue
            function = inner.get(node)
            names = constants | (_assigned(ast.walk(function)) if function is not None else {})
            texts = list(_texts(node.args[0], names, 0))
            for text in texts or [None]:
                yield Raised(f"{path.relative_to(PACKAGE)}:{node.lineno}", name, text)


def _assigned(nodes: object) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:  # type: ignore[attr-defined]
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for one, value in pairs:
                    if isinstance(one, ast.Name):
                        found.setdefault(one.id, []).append(value)
        if isinstance(node, ast.NamedExpr):
            found.setdefault(node.target.id, []).append(node.value)
    return found


def _texts(node: ast.expr, names: dict[str, list[ast.expr]], depth: int) -> Iterator[str]:
    """What an expression can be, as far as the source says; nothing where it does not."""
    match node:
        case ast.Constant(str(text)):
            yield text
        case ast.JoinedStr(values):
            yield "".join(part.value if isinstance(part, ast.Constant) else FILLED for part in values)  # type: ignore[misc]
        case ast.BinOp(left, ast.Add(), right):
            pairs = itertools.product(*(list(_texts(part, names, depth)) or [FILLED] for part in (left, right)))
            yield from (one + other for one, other in pairs)
        case ast.IfExp(_, one, other):
            yield from (text for part in (one, other) for text in _texts(part, names, depth))
        case ast.Name(name) if depth < 3:
            yield from (text for value in names.get(name, ()) for text in _texts(value, names, depth + 1))
        case ast.BoolOp(_, values):
            yield from (text for part in values for text in _texts(part, names, depth))
