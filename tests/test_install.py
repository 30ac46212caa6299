"""What an installed saekit is to its users: typed, in an editable install too, with its launch files."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "saekit", "accelerate_configs"]
SCRIPT = """\
import torch

import saekit
from saekit import RunConfig, Sae, SaeConfig, SaeTrainer, TrainConfig

sae = Sae.load_from_disk("x")
reveal_type(sae(torch.zeros(2, sae.d_in)))  # tuple[...], fallback=saekit.sae.output.SaeOutput
reveal_type(sae(torch.zeros(2, sae.d_in)).recon)  # torch._tensor.Tensor
reveal_type(saekit.load("x"))  # saekit.sae.model.Sae
reveal_type(saekit.load_many("x"))  # dict[str, saekit.sae.model.Sae]
reveal_type(saekit.train("m", "d", k=3))  # pathlib.Path
reveal_type(saekit.evaluate("x").layers[0].reconstruction.fvu.value)  # float
reveal_type(TrainConfig.from_yaml("x"))  # saekit.config.schema.TrainConfig
reveal_type(RunConfig.from_yaml("x").train.ctx_len)  # int | None
reveal_type(TrainConfig(SaeConfig(k=3), ctx_len=5, max_tokens=10, layers=(1, 2)).sae.k)  # int
reveal_type(SaeTrainer.fit)  # def (self: saekit.training.trainer.SaeTrainer) -> pathlib.Path
saekit.load(3)  # error: incompatible type "int"
saekit.nosuch  # error: has no attribute "nosuch"
"""
"""Behind each `#`, what mypy says of the line."""
IN_TORCH = ("distributed", "_inductor", "_dynamo", "ao", "fx", "utils", "export", "onnx", "_functorch", "testing")
UNREAD = (
    *(f"torch.{part}" for part in IN_TORCH),
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "rich",
    "numpy",
)
CONFIG = f"[mypy]\n[mypy-{','.join(f'{name}.*' for name in UNREAD)}]\nfollow_imports = skip\n"
"""What the types of these lines do not come from is not read, which takes a minute."""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a checkout builds from: building leaves files where it is done."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


def build(checkout, hook):
    """Build a wheel as pip does, without its isolated environment, which needs a network."""
    pytest.importorskip("setuptools", minversion="77")
    wheels = checkout.parent / hook
    code = f"from setuptools import build_meta; build_meta.{hook}({str(wheels)!r})"
    wheels.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_carries_the_launch_files_and_what_is_not_python(checkout):
    with zipfile.ZipFile(build(checkout, "build_wheel")) as wheel:
        listed = wheel.namelist()
        (metadata,) = (wheel.read(name).decode() for name in listed if name.endswith(".dist-info/METADATA"))
    names = set(listed)
    assert len(names) == len(listed)
    assert "License-Expression: MIT\n" in metadata
    assert "Classifier: Programming Language :: Python :: 3.14\n" in metadata
    assert {f"saekit/accelerate_configs/{file.name}" for file in (ROOT / "accelerate_configs").glob("*.yaml")} <= names
    assert {"saekit/py.typed", "saekit/api.py", "saekit/demo/model/config.json"} <= names
    assert not any(name.startswith(("tests", "benchmarks", "accelerate_configs")) for name in names)


@pytest.mark.slow
def test_a_users_script_is_typed_with_an_editable_install(checkout, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (folder for folder in tmp_path.glob("venv/**/site-packages") if not folder.parent.is_symlink())
    with zipfile.ZipFile(build(checkout, "build_editable")) as wheel:
        wheel.extractall(site)
    paths = [file.read_text().strip() for file in site.glob("*.pth")]
    assert paths == [f"{checkout}"]  # and no import hook, which type checkers cannot follow
    libraries = Path(pytest.importorskip("mypy").__file__).parents[1]  # torch need not be installed a second time
    (site / "libraries.pth").write_text(f"{libraries}\n")

    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "mypy.ini").write_text(CONFIG)
    (tmp_path / "user" / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [python, "-m", "mypy", "--cache-dir", tmp_path / "cache", "script.py"],
        cwd=tmp_path / "user",
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
    )
    said = {}
    for line in done.stdout.splitlines():
        if found := re.match(r"script\.py:(\d+): (?:note: Revealed type is \"(.*)\"|(error: .*))$", line):
            said[int(found[1])] = found[2] or found[3]
    expected = {number: line.split("  # ")[1] for number, line in enumerate(SCRIPT.splitlines(), 1) if "  # " in line}
    assert said.keys() == expected.keys(), done.stdout + done.stderr
    for number, parts in expected.items():
        assert all(part in said[number] for part in re.split(r"\[\.\.\.\], |(?<=error): ", parts)), said[number]
