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
                "cache",
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
                "serving",
            ),
            "train",
            "watch",
        )
    },
    "saekit.config": set(),
    "saekit.doctor": set(),
    "saekit.report": set(),
    "saekit.planning": TORCH,
    "saekit.analysis": TORCH,
}
"""What importing a module may bring along. The last two import all rooms below them, from `sae` to `training`."""
LIGHT = "import pydantic, rich.console, typer, yaml, saekit.config"
"""What all commands import and may: other packages, and of ours what takes longest."""
HELP = ("train", "cache", "eval", "inspect", "report", "demo", "config", "plan", "hookpoints", "doctor", "watch", "man")
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
    "torch": "import torch, saekit.cli.app",
    # The mapping is a second of regular expressions that loading any model compiles.
    "transformers": "import transformers.modeling_utils, transformers.models.llama.modeling_llama\n"
    "from transformers.conversion_mapping import get_checkpoint_conversion_mapping as mapping\n"
    "mapping('llama')",
    "datasets": "import datasets, saekit.training.launch, saekit.analysis",
}
"""In this order a process imports, and runs after each the commands that may bring that along, in copies of itself."""
AT_ITS_END = (
    "import atexit, json, os, sys\n"
    f"atexit.register(lambda: print('\\nIMPORTED', json.dumps([each for each in {sorted(HEAVY)!r} "
    "if each in sys.modules]), flush=True))\n"
)
IN_COPIES = """
import atexit, gc, os, sys

def code_of_this_copy():
    for first, codes in {stages!r}:
        exec(first)
        gc.freeze()
        for code in codes:
            child = os.fork()
            if child == 0:
                return code
            if os.waitpid(child, 0)[1]:
                sys.exit(f"it failed: {{code}}")
    os._exit(0)

code = code_of_this_copy()
{at_its_end}
status = 0
try:
    exec(code)
except SystemExit as leaving:
    status = leaving.code
atexit._run_exitfuncs()
os._exit(status or 0)  # else Python would take everything apart, which copies all memory
"""


def in_copies(*stages):
    """By name, what each program of a stage says and imports in a copy of a process that has run the stages' firsts.

    Args:
        stages: For each what the process runs first, and the programs by name.
    """
    names = [name for _, programs in stages for name in programs]
    codes = [(first, list(programs.values())) for first, programs in stages]
    found = output_of(IN_COPIES.format(stages=codes, at_its_end=AT_ITS_END))
    return dict(zip(names, found, strict=True))


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
    light, heavy = ([module for module in MODULES if bool(MODULES[module]) == much] for much in (False, True))
    imports = {module: f"import {module}" for module in MODULES}
    stages = (
        (LIGHT, {module: imports[module] for module in light} | {"refused": REFUSED}),
        ("import saekit.cli.app", {command: saekit_command(*command, "--help") for command in HELPS}),
        (FIRST["torch"], {module: imports[module] for module in heavy}),
    )
    return in_copies(*stages)


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

    stages = {library: {} for library in FIRST}
    for command, libraries in COMMANDS.items():
        stages[[library for library in FIRST if library in libraries][-1]][command] = code_of(command)
    return in_copies(*((FIRST[library], programs) for library, programs in stages.items()))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_running_a_command(command, ran):
    said, came = ran[command]
    assert came <= COMMANDS[command]
    assert came >= TORCH
    assert said, "it has run"
