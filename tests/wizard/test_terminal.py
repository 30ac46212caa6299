"""`saekit config` as somebody at a terminal has it: a real process on a pseudo-terminal, keys typed."""

import re
import shlex
import signal
from pathlib import Path

import pexpect
import pytest
import yaml

import saekit
from tests.cli.conftest import saekit as saekit_here  # noqa: F401  # a fixture

ROOT = Path(saekit.__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    # pexpect forks; Python warns of that from 3.12 on where a process has threads, as one with torch does.
    pytest.mark.filterwarnings("ignore:.*use of forkpty:DeprecationWarning"),
]
ESCAPE, CTRL_C, CTRL_D, UP, DOWN, RIGHT = "\x1b", "\x03", "\x04", "\x1b[A", "\x1b[B", "\x1b[C"
CLEAR, BACKSPACE = "\x15", "\x7f"

ASKS = {
    "machine": "This machine has",
    "model": "The language model to train on",
    "dataset": "Text or token ids",
    "hookpoints": "What to train on",
    "layers": "Which layers",
    "dictionary": "Latents of each SAE",
    "k": "Active latents per token",
    "ctx_len": "Tokens per sequence",
    "max_tokens": "How many tokens to train on",
    "batch_size": "Sequences per process and step",
    "placement": "every process holds all SAEs",
    "run": "Folder of the run",
    "confirm": "Nothing has been written so far",
}
"""By question, what only it says."""


def plain(shown):
    """Without colors and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


class Wizard(pexpect.spawn):
    """The process; what it has written since the last answer is looked at, and no more than that."""

    def asks(self, question, default):
        """Wait until it asks, with this answer offered and the line of keys drawn."""
        self.expect_exact(ASKS[question])
        shown = self.before + self.after
        self.expect_exact("Ctrl-C quits")
        assert default in plain(self.before), (question, default, self.before)
        return shown

    def answer(self, *pairs):
        """Answer these questions, each with a line; an empty one takes what is offered."""
        for question, default, line in pairs:
            self.asks(question, default)
            self.send(f"{line}\r")

    def ends(self, code):
        """Wait for the end; returns the rest."""
        self.expect(pexpect.EOF)
        self.close()
        assert (self.exitstatus, self.signalstatus) == (code, None)
        return self.before


@pytest.fixture
def wizard(tmp_path, forked, environment):
    running = []

    def begin(*arguments, size=(60, 200)):
        command = ["-m", "saekit", "config", *map(str, arguments)]
        child = Wizard(
            str(forked.python), command, cwd=tmp_path, env=environment, encoding="utf-8", timeout=120, dimensions=size
        )
        running.append(child)
        return child

    yield begin
    for child in running:
        child.close(force=True)


@pytest.fixture
def small(model_dir, text_file):
    """Answers for a small run, from the model to the batch."""
    return [
        ("model", "EleutherAI/pythia-160m", model_dir),
        ("dataset", "NeelNanda/pile-10k", text_file),
        ("hookpoints", "resid", ""),
        ("layers", "all", "even"),
        ("dictionary", "32x", "64 latents"),
        ("k", "32", "4"),
        ("ctx_len", "64", "32"),
        ("max_tokens", "all", "2k"),
        ("batch_size", "8", "4"),
    ]


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_answers_typed_and_asked_again_with_them_as_defaults(wizard, small, tmp_path, model_dir, text_file):
    first = wizard()
    first.answer(("machine", "1", "2"), *small)
    shown = first.asks("placement", "layer-map")
    assert "Use layer-map" in plain(shown)
    for text in ("ddp ", "layer-map ", "zero3 ", "fits", "256 tokens per optimizer step"):
        assert text in shown
    first.send(f"{DOWN}\r")  # the one behind layer-map
    first.answer(("run", "checkpoints/", "runs/mine"))
    shown = first.asks("confirm", "yes")
    assert "run.yaml (new)" in shown
    assert "launch.yaml (new): zero3 on 2 processes" in shown
    assert left_in(tmp_path) == []
    first.send("\r")
    rest = first.ends(0)
    assert rest.splitlines()[-1] == "saekit train --config run.yaml --launch launch.yaml"
    assert left_in(tmp_path) == ["launch.yaml", "run.yaml"]
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written == {
        "model": str(model_dir), "dataset": str(text_file), "layers": "0-2:2", "num_latents": 64, "k": 4,
        "ctx_len": 32, "max_tokens": 2000, "batch_size": 4, "save_dir": "runs", "run_name": "mine",
    }  # fmt: skip
    before = (tmp_path / "run.yaml").read_text(), (tmp_path / "launch.yaml").read_text()

    again = wizard()
    again.answer(
        ("machine", "2", ""),
        ("model", str(model_dir), ""),
        ("dataset", str(text_file), ""),
        ("hookpoints", "resid", ""),
        ("layers", "0-2:2", ""),
        ("dictionary", "64 latents", ""),
        ("k", "4", f"{RIGHT}0\x7f\x7f5"),  # what is offered, edited: 4, 40, 5
        ("ctx_len", "32", ""),
        ("max_tokens", "2000", ""),
        ("batch_size", "4", ""),
        ("placement", "zero3", ""),
        ("run", "runs/mine", ""),
    )
    assert "run.yaml (replaces the existing file)" in again.asks("confirm", "yes")
    assert (tmp_path / "run.yaml").read_text() == before[0]
    again.send("\r")
    again.ends(0)
    assert (tmp_path / "run.yaml").read_text() == before[0].replace("k: 4\n", "k: 5\n")
    assert (tmp_path / "launch.yaml").read_text() == before[1]


def test_wrong_answers_then_right_ones(wizard, small, tmp_path):
    running = wizard()
    running.answer(("machine", "1", "0"), ("machine", "0", f"{CLEAR}1"))
    edits = {"k": f"{BACKSPACE * 2}4", "ctx_len": f"{BACKSPACE * 2}32"}
    """How an answer that was refused becomes the right one, where it is not typed again."""
    wrong = {
        "model": ("./no-such-model", "there is no such folder"),
        "dataset": ("no-such.jsonl", "there is no such file or folder"),
        "hookpoints": ("mlpx", "--hookpoints mlpx: there is no such module"),
        "layers": ("7", "--layers 7: out of range; the model has 3 layers, 0 to 2"),
        "dictionary": ("5", "5 is less than the width 16: write 5x"),
        "k": ("65", "--k 65 is larger than the dictionary of 64 latents"),
        "ctx_len": ("65", "--ctx-len 65 is more than the 64 tokens"),
        "max_tokens": ("some", "--max-tokens 'some': expected a whole number"),
        "batch_size": ("1e9", "fewer than one optimizer step of 1000000000"),
    }
    for question, default, right in small:
        answer, problem = wrong[question]
        running.answer((question, default, answer))
        running.expect_exact(ASKS[question])  # the same question, and below it the answer, for the user to edit
        running.expect_exact(problem)
        assert f"› {answer}" in plain(running.before)
        running.expect_exact("Ctrl-U clears")
        running.expect_exact("Ctrl-C quits")
        running.send(f"{edits.get(question, f'{CLEAR}{right or default}')}\r")
    running.answer(("run", "checkpoints/", ""), ("confirm", "yes", "maybe"))
    running.expect_exact("'maybe' is not an answer: yes writes the files, no leaves everything as it was")
    assert left_in(tmp_path) == []
    running.send(f"{CLEAR}yes\r")
    assert running.ends(0).splitlines()[-1] == "saekit train --config run.yaml"
    assert left_in(tmp_path) == ["run.yaml"]
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["k"] == 4


def test_back_over_several_questions_by_key_and_by_sign(wizard, small, tmp_path):
    running = wizard()
    running.asks("machine", "1")
    running.send(ESCAPE)  # there is nothing before the first
    running.answer(("machine", "1", "1"), *small[:6])
    for question, default in (("ctx_len", "64"), ("k", "4"), ("dictionary", "64 latents")):
        running.asks(question, default)
        running.send(ESCAPE)
    running.asks("layers", "even")
    running.send(f"{UP}\r")  # the one before it
    running.answer(("dictionary", "64 latents", ""), ("k", "4", "<"), ("dictionary", "64 latents", "8x"))
    running.answer(("k", "4", ""), ("ctx_len", "64", ""), ("max_tokens", "all", ""), ("batch_size", "8", ""))
    running.answer(("run", "checkpoints/", ""), ("confirm", "yes", ""))
    running.ends(0)
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (written["expansion_factor"], written["k"], written["ctx_len"]) == (8, 4, 64)
    assert {"layers", "num_latents"}.isdisjoint(written)


@pytest.mark.parametrize("way", ["Ctrl-C", "Ctrl-C at the end", "Ctrl-D", "no", "a signal"])
def test_leaving_writes_nothing_and_says_so(wizard, small, tmp_path, way):
    before = "k: 4  # as it was\n"
    (tmp_path / "run.yaml").write_text(before)
    running = wizard()
    if way in ("Ctrl-C at the end", "no"):
        running.answer(("machine", "1", "1"))
        for question, _, line in small:
            running.answer((question, "", line))
        running.answer(("run", "checkpoints/", ""))
        running.asks("confirm", "yes")
        running.send("no\r" if way == "no" else CTRL_C)
    else:
        running.asks("machine", "1")
        if way == "a signal":
            running.kill(signal.SIGINT)
        else:
            running.send(CTRL_C if way == "Ctrl-C" else CTRL_D)
    rest = running.ends(130)
    assert rest.count("Nothing was written.") == 1
    assert "Traceback" not in rest
    assert left_in(tmp_path) == ["run.yaml"]
    assert (tmp_path / "run.yaml").read_text() == before


def test_options_are_offered_as_defaults(wizard, tmp_path, model_dir, text_file):
    running = wizard(model_dir, text_file, "--num-latents", 64, "--k", 3, "--ctx-len", 16, "--num-processes", 2)
    running.answer(("machine", "2", ""), ("model", str(model_dir), ""), ("dataset", str(text_file), ""))
    running.answer(("hookpoints", "resid", ""), ("layers", "all", ""))
    running.answer(("dictionary", "64 latents", ""), ("k", "3", ""), ("ctx_len", "16", ""))
    running.asks("max_tokens", "all")
    running.send(CTRL_C)
    running.ends(130)
    assert left_in(tmp_path) == []


def test_on_a_narrow_terminal_lines_break_between_words(wizard):
    running = wizard(size=(24, 50))
    running.expect_exact("without writing")
    lines = re.split(r"[\r\n]+", plain(running.before + running.after))
    assert max(map(len, lines)) <= 50
    for text in (
        "one process is best on a CPU, since more share its memory",
        "Esc or < goes back · Ctrl-C quits without writing",
    ):
        assert text in " ".join(lines)
        assert text not in lines
    running.send(CTRL_C)
    running.ends(130)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("config", "--yes", "MODEL", "TEXT", "--num-processes", 2, "--num-latents", 64, "--k", 4), 0, "Start the run"),
        (("config", "--yes", "MODEL", "TEXT", "--layers", "9,10,11", "--plugin", "p" * 90), 2, "Error: "),
        (("plan", "MODEL", "--num-latents", 2**28, "--k", 32), 0, "does not fit"),
    ],
    ids=["config", "error", "plan"],
)
def test_at_80_columns_no_word_is_broken(tmp_path, forked, environment, model_dir, text_file, command, code, said):
    """What is written has no line that the terminal would have to break, but for words longer than a line."""
    places = {"MODEL": str(model_dir), "TEXT": str(text_file)}
    words = [places.get(word, str(word)) for word in command]
    shown, status = pexpect.run(
        shlex.join([str(forked.python), "-m", "saekit", *words]),
        cwd=tmp_path, env=environment, timeout=120, withexitstatus=True, dimensions=(24, 80),
    )  # fmt: skip
    shown = plain(shown.decode())
    assert status == code, shown
    assert said in shown
    lines = [line.rpartition("\r")[2].rstrip() for line in shown.replace("\r\n", "\n").split("\n")]
    assert not [line for line in lines if len(line) > 80 and " " in line.strip("│ ")]


def test_without_a_terminal_it_says_what_to_do(config, tmp_path, model_dir, text_file):
    for arguments in ((), (model_dir, text_file)):
        done = config(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "this is no terminal: add --yes" in done.stderr
        assert done.stdout == ""
    assert left_in(tmp_path) == []


def test_yes_asks_nothing_and_prints_the_command_alone(config, tmp_path, model_dir, text_file):
    small = ("--num-latents", 64, "--k", 4, "--ctx-len", 32, "--lr", "1e-3")
    done = config("--yes", model_dir, text_file, *small, "--output", "a b.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "saekit train --config 'a b.yaml'\n"
    assert left_in(tmp_path) == ["a b.yaml"]
    assert yaml.safe_load((tmp_path / "a b.yaml").read_text())["lr"] == 0.001


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "MODEL is missing"),
        (("M",), "DATASET is missing"),
        (("M", "D", "--k", "100"), "--k 100 is larger than the dictionary of 64 latents"),
        (("M", "D", "--layers", "9"), "--layers 9: out of range"),
        (("M", "no-such.jsonl"), "there is no such file or folder"),
        (("M", "D", "--text-column", "id"), "--text-column 'id'"),
        (("M", "D", "--placement", "ddp"), "--placement ddp needs several processes"),
        (("M", "D", "--gpus", "2"), "give both, or neither"),
        (("M", "D", "--output", "launch.yaml"), "--output and --launch-file both name launch.yaml"),
    ],
)
def test_yes_refuses_what_train_would_refuse(
    saekit_here,  # noqa: F811
    tmp_path,
    model_dir,
    text_file,
    arguments,
    part,
):
    names = {"M": str(model_dir), "D": str(text_file)}
    active = () if "--k" in arguments else ("--k", 4)
    done = saekit_here("config", "--yes", *(names.get(each, each) for each in arguments), "--num-latents", 64, *active)
    assert done.code == 2
    assert part in done.err.splitlines()[-1]
    assert done.out == ""
    assert left_in(tmp_path) == []
