"""Heavy libraries are imported by the command that needs them, and by no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import saekit

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "pandas",
    "plotly",
    "prompt_toolkit",
    "pyarrow",
    "sklearn",
    "torch",
    "transformers",
    "triton",
}
TORCH = {"torch", "numpy"}
MODEL = TORCH | {"transformers", "accelerate", "huggingface_hub", "jinja2", "triton"}
"""transformers imports jinja2, accelerate and the part of torch that imports Triton, whether it needs them or not."""
DATA = MODEL | {"datasets", "pandas", "pyarrow"}

MODULES = {
    "saekit": set(),
    "saekit.api": set(),
    "saekit.cli": set(),
    **{
        f"saekit.cli.{name}": set()
        for name in (
            *(
                "app",
                "arguments",
                "checkpoints",
                "completion",
                "config",
                "examples",
                "first_steps",
                "help",
                "hookpoints",
                "launch",
                "man",
                "options",
                "output",
                "plan",
                "reference",
            ),
            "train",
        )
    },
    "saekit.config": set(),
    "saekit.doctor": set(),
    "saekit.report": set(),
    "saekit.planning": TORCH,
    "saekit.analysis": TORCH,
}
"""What importing a module may bring along. The last two import all rooms below them, from `sae` to `training`."""
LIGHT = "import pydantic, rich.console, typer, yaml"
"""What all commands import and may, from other packages."""
HELP = ("train", "eval", "inspect", "report", "demo", "config", "plan", "hookpoints", "doctor", "man")
REFUSED = "import saekit\ntry:\n    saekit.train('m', 'd', nosuch=1)\nexcept saekit.UserError:\n    pass\n"
HELPS = [(), *((name,) for name in HELP)]
SMALL = ("--ctx-len", "32", "--max-tokens", "512", "--layers", "1", "--num-latents", "64", "--k", "4")
COMMANDS = {
    "train MODEL TEXT --save-dir RUNS --run-name fresh": DATA,
    "train MODEL TEXT --dry-run": MODEL,
    "plan MODEL": MODEL,
    "hookpoints MODEL": MODEL,
    "config MODEL TEXT --yes --output OUT/run.yaml --launch-file OUT/launch.yaml": DATA | {"prompt_toolkit"},
    "inspect RUN": TORCH,
    "eval RUN TEXT --max-tokens 256": DATA,
    "report RUN TEXT --max-tokens 256 --latents 8 --output OUT/report.html": DATA | {"plotly"},
}
"""What a command may bring along on a CPU."""


FIRST = {
    "torch": "import torch",
    "transformers": "import transformers.modeling_utils, transformers.models.llama.modeling_llama, torch._dynamo",
    "datasets": "import datasets, saekit.training.launch, saekit.analysis",
}
"""In this order a process imports, and runs after each the commands that may bring that along, in copies of itself."""
AT_ITS_END = (
    "import atexit, json, os, sys\n"
    f"atexit.register(lambda: print('\\nIMPORTED', json.dumps([each for each in {sorted(HEAVY)!r} "
    "if each in sys.modules]), flush=True))\n"
)
IN_COPIES = """
import os, sys

def code_of_this_copy():
    for first, codes in {stages!r}:
        exec(first)
        for code in codes:
            child = os.fork()
            if child == 0:
                return code
            if os.waitpid(child, 0)[1]:
                sys.exit(f"it failed: {{code}}")
    os._exit(0)

code = code_of_this_copy()
{at_its_end}
exec(code)
"""


def in_copies(*stages):
    """What each program says and imports: for each stage, in copies of a process that has run the first ones so far."""
    return output_of(IN_COPIES.format(stages=stages, at_its_end=AT_ITS_END))


def output_of(program):
    """The output of each command, and which of `HEAVY` it had imported."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout
    found, said = [], []
    for line in done.stdout.splitlines():
        if line.startswith("IMPORTED "):
            found.append(("\n".join(said).strip(), set(json.loads(line.removeprefix("IMPORTED ")))))
            said = []
        else:
            said.append(line)
    return found


def saekit_command(*arguments):
    return f"sys.argv = {['saekit', *map(str, arguments)]!r}\nfrom saekit.cli import main\nmain()\n"


@pytest.fixture(scope="module")
def came():
    """By module, what importing it brought along; by command, what its help did; and what a refused option did."""
    light, heavy = (
        {name: f"import {name}" for name in MODULES if bool(MODULES[name]) == much} for much in (False, True)
    )
    light |= {command: saekit_command(*command, "--help") for command in HELPS} | {"refused": REFUSED}
    found = in_copies((LIGHT, [*light.values()]), (FIRST["torch"], [*heavy.values()]))
    return dict(zip([*light, *heavy], found, strict=True))


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module(module, came):
    _, libraries = came[module]
    assert libraries <= MODULES[module]


def test_every_module_of_the_command_line_is_in_the_table():
    from saekit.cli.app import app

    files = {f"saekit.cli.{file.stem}" for file in (Path(saekit.__file__).parent / "cli").glob("[!_]*.py")}
    assert files <= MODULES.keys()
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(HELP)


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_needs_none(command, came):
    said, libraries = came[command]
    assert libraries == set()
    assert "Usage: saekit" in said


def test_what_is_refused_needs_none(came):
    _, libraries = came["refused"]
    assert libraries == set()


@pytest.fixture(scope="module")
def run(model_dir, text_file, tmp_path_factory):
    import saekit
    from saekit.report import Reporters

    options = dict(zip((name.removeprefix("--").replace("-", "_") for name in SMALL[::2]), SMALL[1::2], strict=True))
    folder = tmp_path_factory.mktemp("runs")
    saekit.train(model_dir, str(text_file), save_dir=folder, run_name="run", reporter=Reporters(), **options)
    return folder / "run"


@pytest.fixture(scope="module")
def ran(model_dir, text_file, run, tmp_path_factory):
    """By command, what it said and imported."""

    def code_of(command):
        out = tmp_path_factory.mktemp("out")
        small = SMALL if command.split()[0] in ("train", "plan", "config") else ()
        places = {"MODEL": model_dir, "TEXT": text_file, "RUNS": out, "RUN": run}
        arguments = [str(places.get(part, part.replace("OUT", str(out)))) for part in command.split()]
        return saekit_command(*arguments, *small)

    commands = {library: [] for library in FIRST}
    for command, libraries in COMMANDS.items():
        commands[[library for library in FIRST if library in libraries][-1]].append(command)
    stages = [(FIRST[library], [code_of(command) for command in some]) for library, some in commands.items()]
    return dict(zip(sum(commands.values(), []), in_copies(*stages), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_running_a_command(command, ran):
    said, came = ran[command]
    assert came <= COMMANDS[command]
    assert came >= TORCH
    assert said, "it has run"
