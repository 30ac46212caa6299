"""Every command in README.md, in the documents and in the examples runs as it stands there, at a small scale.

A shell runs each line in a folder that has what the lines name: `MODEL`, `DATASET`, `checkpoints/RUN` and so on.
`SMALL` is added at their ends, `CHANGED` replaces what this machine lacks, `NOT_HERE` says why a command does not run.
"""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "examples").glob("*.py"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
PROGRAM = re.compile(r"(saekit|python|accelerate|torchrun|sbatch|srun|make|pip|benchmarks/\S+)(?= |$)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:    [^\n]*\n|\n(?=    ))+)")
SHELLS = ("bash", "sh", "console")

NOT_HERE = {
    r"make ": "Makefile: sets up an environment, or is what runs these tests",
    r"benchmarks/": "hours, or a GPU",
    r"sbatch |srun ": "needs SLURM; tests/placement/test_slurm.py runs the script",
    r"saekit demo": "tests/demo/test_demo.py runs it",
    r"saekit doctor|saekit plan --calibrate": "measures the machine; tests/doctor and tests/planning",
    r"saekit watch|saekit report .* --serve": "runs until it is stopped; tests/cli and tests/views run it",
    r"python examples/train_demo_lm.py": "25 minutes",
    r".* --plugin (abs_topk|stored|timed).py": "tests/test_docs_extending.py runs it with the page's plug-ins",
}
"""By what a command begins with, why it does not run."""
CHANGED = {
    r"--launch (ddp|layer-map|zero3)": r"--launch \1-cpu --num-processes 2",
    r"accelerate_configs/zero3.yaml": "accelerate_configs/zero3_cpu.yaml",
    r"saekit plan MODEL --layers": "saekit plan llama-3-8b --layers",
    r" --crosscode-revision step1000": "",  # the hub has revisions, a folder has none
    r"examples/circuit.py saekit-demo/run-1": "examples/circuit.py checkpoints/transcoders",
    r"--num-processes 4": "--num-processes 2",
}
"""Patterns in commands, and what stands there here."""
FAST = "--num-latents 64 --k 4 --ctx-len 16 --batch-size 2 --max-tokens 128"
SMALL = {
    r"saekit train --(resume|config) checkpoints": "",
    r"saekit cache ": "--ctx-len 16 --batch-size 2 --max-tokens 128",
    r"saekit train --activations": "--num-latents 64 --batch-size 2",
    r"saekit train .*--resume": f"{FAST} --layers 0-5 --run-name RUN",
    r"saekit train .*--eval-every": f"{FAST} --eval-tokens 64",
    r".*saekit train ": FAST,
    r"saekit eval ": "--max-tokens 256",
    r"saekit report ": "--latents 8",
}
"""By what a command begins with, what to add to it; the first that matches."""
BEFORE = (
    f"saekit train MODEL DATASET {FAST} --layers 0-5 --run-name RUN",
    f"saekit train MODEL DATASET {FAST} --transcode --run-name transcoders",
    "saekit config --yes MODEL DATASET --placement layer-map --num-processes 2",
)
"""What makes the runs and files that the commands take."""


def text_of(page):
    text = page.read_text(encoding="utf-8")
    return text if page.suffix == ".md" else ast.get_docstring(ast.parse(text)) + "\n"


def commands(text):
    """Yield the commands that blocks of a text show, without prompts and without what is said about them."""
    blocks = [(language, block) for language, block in FENCED.findall(text) if language in ("", *SHELLS)]
    blocks += [("", block) for block in INDENTED.findall(FENCED.sub("", text))]
    for language, block in blocks:
        for line in block.splitlines():
            line = re.split(r"\s{2,}|\s#\s", line.strip().removeprefix("$ "))[0]
            if PROGRAM.match(line):
                yield line
            else:
                assert language not in SHELLS or not line or line.startswith("#"), f"no test runs {line!r}"


SHOWN = {line: page.name for page in PAGES for line in commands(text_of(page))}
HERE = [line for line in SHOWN if not any(re.match(pattern, line) for pattern in NOT_HERE)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_dir, text_file, forked):
    """`run(line)` has a shell run a line in a folder in which there is what the commands name."""
    folder = tmp_path_factory.mktemp("shell")
    config = LlamaConfig.from_pretrained(model_dir, num_hidden_layers=12)
    torch.manual_seed(0)
    for model in ("MODEL", "OTHER", "BASE", "TUNED", "EleutherAI/pythia-160m"):
        LlamaForCausalLM(config).save_pretrained(folder / model)
        for file in model_dir.glob("tokenizer*"):
            shutil.copy(file, folder / model)
    LlamaConfig(num_hidden_layers=32).save_pretrained(folder / "llama-3-8b")
    for text in ("DATASET/text.jsonl", "data/text.jsonl", "my_text.jsonl", "other_text.jsonl"):
        (folder / text).parent.mkdir(exist_ok=True)
        (folder / text).symlink_to(text_file)
    for ours in ("saekit", "examples", "accelerate_configs", "README.md"):
        (folder / ours).symlink_to(ROOT / ours)
    (folder / "saekit-demo").mkdir()
    (folder / "saekit-demo" / "run-1").symlink_to(folder / "checkpoints" / "RUN")
    environment = forked.environment(PATH=f"{forked.commands}{os.pathsep}{os.environ['PATH']}", COLUMNS=200)

    def call(line):
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    for line in BEFORE:
        call(line)
    return call


def adapted(line, number):
    """The command as it runs here; each run has a name of its own."""
    for pattern, here in CHANGED.items():
        line = re.sub(pattern, here, line)
    added = next((more for pattern, more in SMALL.items() if re.match(pattern, line)), "")
    if added and "--run-name" not in f"{line} {added}" and "train" in line:
        added += f" --run-name {number}"
    return f"{line} {added}"


@pytest.mark.slow
@pytest.mark.parametrize("line", HERE, ids=lambda line: f"{SHOWN[line]}: {line}")
def test_a_command_runs(line, run):
    run(adapted(line, HERE.index(line)))


def test_no_exception_is_left_over():
    assert [each for each in NOT_HERE if not any(re.match(each, line) for line in SHOWN)] == []
    assert [each for each in CHANGED if not any(re.search(each, line) for line in HERE)] == []
    assert len(HERE) > 35


def test_commands_are_found():
    text = "    saekit train M D      trains\n\n```\n$ saekit eval R  # says\nprose\n```\n\n    saekits\n\n"
    assert list(commands(text + "```python\nsaekit x\n```\n")) == ["saekit eval R", "saekit train M D"]
    with pytest.raises(AssertionError, match="no test runs 'nosuch x'"):
        list(commands("```bash\nnosuch x\n```\n"))
