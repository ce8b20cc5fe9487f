"""The shape of the house: imports go down, `modeling/` stands alone, files stay readable, the surface is stated."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "srf_retrofit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

# Bottom first: a module imports only from floors below its own. Rooms are named as wholes; inside a room no two modules
# import each other, however many steps apart.
FLOORS = [
    {"modeling", "files", "theory", "timing"},
    {"calibration", "recipes", "data", "report", "plan"},
    {"surgery", "pretrained"},
    {"training", "testing"},
    {"evaluation"},
    {"synthesis", "pipeline", "bench"},
    {"demo"},
    {"cli"},
    {"__init__"},
]
MODELING_FLOORS = [
    {"eight_bits"},
    {"configuration", "saving", "triton_eight_bits", "feature_sums", "operators", "triton_sinks", "forget_gate"},
    {"configuration_hf", "random_features", "feature_map", "state", "softmax_parts"}
    | {"triton_common", "triton_launch"},
    {"retention", "block_tables", "triton_pure", "triton_retain", "triton_sums", "triton_decode_fold"},
    {"feature_attention", "fused_call", "triton_attend", "triton_decode_kernel"},
    {"chunked", "triton_attend_backward", "triton_decode"},
    {"recurrent", "bidirectional", "fused_forward", "checks"},
    {"layout", "fused_backward", "head_groups"},
    {"fused"},
    {"fused_attention"},
    {"ops"},
    {"features", "standalone"},
    {"cache", "learned_maps"},
    {"attention", "packing"},
    {"generation"},
    {"modeling"},
    {"__init__"},
]
MODELING_MAY_IMPORT = {"torch", "transformers", "triton"}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, with line numbers; relative ones are resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            if node.level and not node.module:  # from . import x: each name may be a module
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def floor(name: str, floors: list[set[str]]) -> int:
    for height, rooms in enumerate(floors):
        if name in rooms:
            return height
    raise AssertionError(f"{name} has no floor yet: place it in tests/test_architecture.py")


def room(path: Path) -> str:
    """First name below the package: of a room, or of a module that stands by itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = floor(room(path), FLOORS)
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] != PACKAGE.name or len(parts) == 1:
            continue
        target = parts[1]
        if not (PACKAGE / target).is_dir() and not (PACKAGE / f"{target}.py").is_file():
            target = "__init__"  # `from srf_retrofit import name`
        if target == room(path) != "__init__":
            continue  # inside a room: the next test
        below = floor(target, FLOORS)
        assert below < here, f"{path.name}:{line} imports {name}, which does not lie below it"


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_have_no_circles(name: str) -> None:
    directory = PACKAGE / name
    modules = {path.stem for path in directory.glob("*.py")}
    siblings: dict[str, set[str]] = {}
    for path in directory.glob("*.py"):
        inside = [found.split(".")[2:] for found, _ in imports(path) if found.split(".")[:2] == [PACKAGE.name, name]]
        # `from . import name`, where no module has that name, asks the room itself.
        siblings[path.stem] = {rest[0] if rest and rest[0] in modules else "__init__" for rest in inside}
    try:
        list(graphlib.TopologicalSorter(siblings).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"{name}: {' imports '.join(reversed(error.args[1]))}") from None


def test_every_room_says_what_it_holds() -> None:
    for name in ROOMS:
        assert ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))), name


@pytest.mark.parametrize("path", sorted((PACKAGE / "modeling").glob("*.py")), ids=lambda p: p.name)
def test_modeling_stands_alone(path: Path) -> None:
    here = floor(path.stem, MODELING_FLOORS)
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == PACKAGE.name:
            assert parts[1] == "modeling", f"{path.name}:{line} imports {name}: it would be missing in a checkpoint"
            if len(parts) > 2:
                below = floor(parts[2], MODELING_FLOORS)
                assert below < here, f"{path.name}:{line} imports {name}, which does not lie below it"
        else:
            known = parts[0] in MODELING_MAY_IMPORT or parts[0] in sys.stdlib_module_names
            assert known, f"{path.name}:{line} imports {name}"


def test_modeling_is_flat() -> None:
    """`save_pretrained` copies the files into one directory, so there is nothing but siblings."""
    assert not [p for p in (PACKAGE / "modeling").iterdir() if p.is_dir() and p.name != "__pycache__"]


def test_import_is_light() -> None:
    """Importing the package loads neither the tools around it nor what only they need."""
    code = "import sys, srf_retrofit; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(out.stdout.splitlines()[-1]))
    assert not loaded & {
        "matplotlib",
        "gguf",
        "trl",
        "srf_retrofit.cli.main",
        "srf_retrofit.demo",
        "srf_retrofit.report",
    }
    assert "srf_retrofit.surgery" in loaded


@pytest.mark.parametrize("path", sorted([*SOURCES, *(ROOT / "tests").rglob("*.py")]), ids=lambda p: p.name)
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def test_public_names() -> None:
    import srf_retrofit

    assert {
        "Attention",
        "ResampleFeaturesCallback",
        "SRFConfig",
        "calibrate",
        "plan_retrofit",
        "resample_features",
        "retrofit",
        "revert",
    } <= set(srf_retrofit.__all__)
    for name in srf_retrofit.__all__:
        assert getattr(srf_retrofit, name).__doc__, f"{name} has no docstring"


def test_command_line_surface() -> None:
    """Commands and options are an interface: taking one away is a decision, made here."""
    from typer.main import get_command

    from srf_retrofit.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    surface = {
        name: {opt for p in command.params for opt in p.opts if opt.startswith("--")}
        for name, command in commands.items()
    }
    assert set(surface) == {"demo", "retrofit", "plan", "eval", "generate", "bench", "synthesize", "distill"}
    for name, options in surface.items():
        assert "--json" in options, f"{name} cannot be read by a program"
    assert {"--num-features", "--window", "--sinks", "--retained", "--projection", "--layers", "--config"} <= surface[
        "retrofit"
    ]
    assert {"--output", "--text", "--steps", "--config"} <= surface["demo"]
    assert {"--model", "--output", "--tokens", "--learning-rate", "--resume", "--overwrite", "--bf16"} <= surface[
        "distill"
    ]
