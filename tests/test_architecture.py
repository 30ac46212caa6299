"""The rooms of docs/design.md: who may import whom."""

import ast
from pathlib import Path

import pytest

import saekit

ROOT = Path(saekit.__file__).parent
ANYWHERE = {"errors", "files", "layout", "registry", "_version", "versions"}
MAY_IMPORT = {
    "sae": set(),
    "config": set(),
    "data": {"config"},
    "activations": {"config", "sae"},
    "placement": {"config", "sae"},
    "report": {"sae"},
    "training": {"config", "sae", "data", "activations", "placement", "evaluation", "report"},
    "doctor": {"config", "sae"},
    "evaluation": {"config", "sae", "data", "activations", "placement", "report"},
    "features": {"activations", "evaluation", "report"},
    "page": {"evaluation", "features", "placement", "report"},
    "planning": {"config", "sae", "activations", "placement", "training"},
    "wizard": {"config", "data", "activations", "planning", "report", "training"},
    "demo": {"config", "cli", "evaluation", "page", "report", "training"},
    "cli": {"config", "demo", "doctor", "evaluation", "page", "planning", "report", "training", "wizard"},
}
"""Rooms of ours that a room may import from, besides itself and `ANYWHERE`."""

FILES = sorted(path for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) > 1)


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
    room = file.relative_to(ROOT).parts[0]
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
    standard |= compiling | {"weakref"}
    for file in (ROOT / "sae").rglob("*.py"):
        found = {name.split(".")[0] for name in imports_of(file)}
        assert found <= allowed | standard, file
