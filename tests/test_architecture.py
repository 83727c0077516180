"""The house's rules that a reader cannot see in one file: which way imports point, and what stays unloaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llamatune"

# From top to bottom: a file may import from its own floor's folder and from floors below.
FLOORS = [
    {"cli", "__main__"},
    {"commands", "python_api", "python_arguments", "python_keywords"},
    {"requests"},
    {"demo"},
    {"judging"},
    {
        "tracking",
        "reporting",
        "benchmarking",
        "sweeping",
        "starting_spec",
        "explaining",
        "documentation",
        "verification",
        "merge_proof",
        "slurm_script",
    },
    {"training"},
    {"inference"},
    {"checkpoints", "data"},
    {"model", "tokenizers"},
    {"memory"},
    {"spec", "spec_grid", "command_options", "spec_schema"},
    {"spec_sections"},
    {"spec_types", "spec_overrides", "spec_faults", "slurm_job_end"},
    {
        *(
            "devices",
            "math_library_variables",
            "out_of_memory",
            "threads",
            "formats",
            "seeds",
            "shared_work",
            "strict_yaml",
            "required_versions",
            "units",
        ),
    },
    {"host_memory", "nvml", "process_group", "processor", "schema_words", "strict_json"},
    {"ranks", "rendezvous", "lockstep"},
    {"launch_variables", "openmp_variables"},
    {"output_files"},
    {"child_process", "durable_writing", "safe_reading", "path_expansion"},
    {"shapes"},
    {"errors", "events", "stop_signals"},
]
SHARED = {"llamatune"}


def rooms() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def floor_of(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, names in enumerate(FLOORS) if room in names)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    known = rooms()
    return [name for name in found if name in known and name not in SHARED]


@pytest.mark.parametrize("module", sorted(name for name in rooms() if not name.endswith("__init__")))
def test_imports_point_down(module: str) -> None:
    upward = [name for name in imports(rooms()[module]) if floor_of(name) < floor_of(module)]
    assert not upward, f"{module} imports {upward} from a floor above"


def test_there_is_no_circle() -> None:
    graph = {name: set(imports(path)) - {name} for name, path in rooms().items()}
    while graph:
        leaves = {name for name, wanted in graph.items() if not wanted & graph.keys()}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {name: wanted for name, wanted in graph.items() if name not in leaves}


def test_drawing_and_the_command_line_live_in_commands_alone() -> None:
    for module, path in rooms().items():
        if ".commands." in module or module == "llamatune.cli":
            continue
        text = path.read_text(encoding="utf-8")
        for library in ("rich", "typer"):
            assert f"import {library}" not in text, module
            assert f"from {library}" not in text, module


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import llamatune") & {"torch", "transformers", "pydantic", "typer", "rich"}


def test_building_the_command_line_loads_neither_torch_nor_pydantic() -> None:
    loaded = loaded_after("import llamatune.cli; llamatune.cli.build_app()")
    assert not loaded & {"torch", "numpy", "pydantic", "yaml", "safetensors", "sentencepiece", "transformers"}


def test_the_whole_package_never_loads_transformers_or_peft() -> None:
    every = "; ".join(f"import {name.removesuffix('.__init__')}" for name in rooms() if "__main__" not in name)
    assert not loaded_after(every) & {"transformers", "peft", "accelerate"}


def test_matplotlib_is_loaded_only_to_draw() -> None:
    every = "; ".join(f"import {name.removesuffix('.__init__')}" for name in rooms() if "__main__" not in name)
    assert "matplotlib" not in loaded_after(every)
    drawing = "from llamatune.reporting.chart_images import require_matplotlib; require_matplotlib()"
    assert "matplotlib" in loaded_after(drawing)


@pytest.mark.parametrize(
    "forbidden", ["weights_only=False", "strict=False)", "pickle.load", "shell=True", "torch.save("]
)
def test_no_code_path_can_run_what_it_reads(forbidden: str) -> None:
    for module, path in rooms().items():
        lines = [
            line for line in path.read_text(encoding="utf-8").splitlines() if forbidden in line and "zip(" not in line
        ]
        assert not lines, f"{module}: {lines}"
