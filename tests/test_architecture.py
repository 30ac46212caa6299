"""The rooms of docs/design.md: who may import whom."""

import ast
from pathlib import Path

import pytest

import saekit
from saekit.registry import PLACEMENTS

ROOT = Path(saekit.__file__).parent
ANYWHERE = {"_version", "errors", "hub", "machine", "model_files", "registry", "text", "units"}
MAY_IMPORT = {
    "sae": set(),
    "demo": set(),
    "config": {"sae"},
    "report": set(),
    "data": {"config"},
    "activations": {"config", "sae", "data"},
    "placement": {"config", "sae"},
    "doctor": {"config", "sae", "placement"},
    "runs": {"config", "sae", "report"},
    "cache": {"config", "data", "activations", "runs"},
    "analysis": {"config", "sae", "data", "activations", "placement", "runs"},
    "training": {"config", "sae", "data", "activations", "placement", "report", "runs", "cache", "analysis"},
    "api": {"config", "sae", "report", "runs", "analysis", "training"},
    "planning": {"config", "sae", "activations", "placement", "runs", "training"},
    "views": {"sae", "activations", "placement", "doctor", "report", "runs", "analysis", "planning"},
    "wizard": {"config", "data", "activations", "placement", "runs", "training", "planning", "views"},
    "cli": {
        "api",
        "config",
        "activations",
        "doctor",
        "placement",
        "runs",
        "cache",
        "analysis",
        "training",
        "planning",
        "views",
        "wizard",
        "demo",
    },
}
"""Rooms of ours that a room may import from, besides itself and `ANYWHERE`."""

FILES = sorted(path for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) > 1 or path.stem == "api")


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            if node.module == "saekit":
                yield from (f"saekit.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_rooms_import_what_they_may(file):
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT[room] | ANYWHERE | {room}
    ours = {name.split(".")[1] for name in imports_of(file) if name.startswith("saekit.")}
    assert ours <= allowed, f"{room} may not import {ours - allowed}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_only_placement_knows_of_ranks(file):
    if file.relative_to(ROOT).parts[0] == "placement":
        return
    forbidden = [
        name for name in imports_of(file) if name.split(".")[0] == "deepspeed" or name.startswith("torch.distributed")
    ]
    assert not forbidden


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nobody_else_compares_a_placements_name(file):
    if file.relative_to(ROOT).parts[0] in ("placement", "config"):
        return
    compared = [
        constant.value
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Compare, ast.match_case, ast.Dict))
        for constant in ast.walk(node.pattern if isinstance(node, ast.match_case) else node)
        if isinstance(constant, ast.Constant) and constant.value in PLACEMENTS.names()
    ]
    assert not compared, "ask the placement instead: see saekit/placement/questions.py"


def test_the_maths_needs_torch_only():
    allowed = {"torch", "triton", "safetensors", "huggingface_hub", "saekit", "__future__"}
    standard = {
        "collections",
        "copy",
        "functools",
        "importlib",
        "json",
        "math",
        "os",
        "pathlib",
        "re",
        "typing",
        "warnings",
    }
    compiling = {"ctypes", "hashlib", "platform", "shutil", "subprocess", "sys", "tempfile", "threading"}
    measuring = {"contextlib", "time"}
    standard |= compiling | measuring | {"copy", "weakref"}
    for file in (ROOT / "sae").rglob("*.py"):
        found = {name.split(".")[0] for name in imports_of(file)}
        assert found <= allowed | standard, file


SPELLED_ONCE: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("config.yaml", "metrics.jsonl", "run.yaml", "checkpoint.json", "saekit.json", "eval.json", "best"),
    ("runs/layout.py",),
)
# Also what `--resume` without a value comes to.
SPELLED_ONCE["latest"] = ("runs/layout.py", "sae/storage.py", "config/options.py", "cli/options.py", "runs/folder.py")
SPELLED_ONCE |= {
    "state.safetensors": ("runs/layout.py",),
    # One SAE's folder needs no run.
    "sae.safetensors": ("sae/storage.py",),
    "cfg.json": ("sae/storage.py",),
}
"""Names of files and folders, and the files of ours in which they stand, besides in what is said to people."""


@pytest.mark.parametrize("name", SPELLED_ONCE)
def test_what_lies_where_is_known_in_one_place(name):
    found = {
        file.relative_to(ROOT).as_posix()
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == name
    }
    assert found <= set(SPELLED_ONCE[name])


def test_globs_of_checkpoints_are_made_in_one_place():
    for file in FILES:
        if file.relative_to(ROOT).as_posix() == "runs/layout.py":
            continue
        said = [
            node.value
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [text for text in said if text.startswith(("step_*", ".step_"))], file


def test_rooms_stand_on_floors():
    """Each room imports rooms that stand before it in the list: none of them can import each other in a circle."""
    rooms = list(MAY_IMPORT)
    for place, room in enumerate(rooms):
        assert MAY_IMPORT[room] <= set(rooms[:place]), room


def test_the_table_of_rooms_says_the_same():
    """docs/design.md, in the same order of floors."""
    page = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page[page.index("| module |") :].split("\n\n")[0].splitlines()]
    said = {
        cells[1].strip(" `/").split("/")[-1].removesuffix(".py"): cells[3] for cells in rows if "saekit/" in cells[1]
    }
    rooms = [name for name in said if name in MAY_IMPORT]
    assert set(rooms) == set(MAY_IMPORT)
    for place, room in enumerate(rooms):
        allowed = {each.strip() for each in said[room].split(",")} - {"–"}
        assert allowed == MAY_IMPORT[room], room
        assert allowed <= set(rooms[:place]), room
