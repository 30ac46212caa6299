"""`saekit watch` next to real runs."""

import io
import json
import re

import pytest
from rich.console import Console

import saekit
from saekit.report.terminal import LiveReporter
from saekit.runs.watch import Watch
from tests.test_api import NAMED


def terminal():
    return Console(file=io.StringIO(), width=100, height=30, force_terminal=True, color_system=None)


def last_picture(console):
    """Its lines, without how long the run took."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", console.file.getvalue())
    lines = text[text.rindex("saekit  ") :].splitlines()
    return [re.sub(r"(done in) +\S.*", r"\1", line.rstrip()) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def run(model_dir, text_file, tmp_path_factory):
    """A finished run, and what its live view showed at the end."""
    folder = tmp_path_factory.mktemp("runs")
    console = terminal()
    options = {**NAMED, "eval_every": 8, "eval_tokens": 512, "auxk_alpha": 0.03, "layers": "0-1", "beta2": 0.99}
    options |= {"k": 4, "max_tokens": 2048, "batch_size": 4}
    checkpoint = saekit.train(
        model_dir, str(text_file), save_dir=folder, run_name="r", reporter=LiveReporter(console), **options
    )
    return checkpoint.parent, last_picture(console)


def without(run, folder, kinds=(), fields=()):
    """A copy of the run as an older version would have left it."""
    folder.mkdir()
    for each in run.iterdir():
        if each.name not in ("metrics.jsonl", "latest"):
            (folder / each.name).symlink_to(each)
    (folder / "latest").symlink_to((run / "latest").readlink())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {name: value for name, value in record.items() if name not in fields}
        for record in records
        if record.get("kind") not in kinds
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return folder


OLDER = {"kinds": ("start", "end"), "fields": ("bad_in_row", "diverged")}


def shown(folder):
    console = terminal()
    watch = Watch(folder, lambda clock: LiveReporter(console, clock))
    assert any(watch.look() for _ in range(2))
    return last_picture(console)


def test_the_view_is_the_one_that_the_run_had(run):
    folder, picture = run
    assert shown(folder) == picture
    assert any("done in" in line for line in picture)
    assert any(line.startswith("evaluated at step 16") for line in picture)
    assert any("✓ saved step 16" in line for line in picture)


def test_a_run_of_an_older_version(run, tmp_path):
    """Where it ran, and in which type, is in no file."""
    folder, picture = run

    def parts(lines):
        at = next(number for number, line in enumerate(lines) if "16/16 steps" in line)
        return lines[:at], lines[at:]

    header, rest = parts(shown(without(folder, tmp_path / "older", **OLDER)))
    assert rest == parts(picture)[1]
    assert header[0] == picture[0]
    assert "2 layers × 64 latents, k 4 · width 16 · –, auto, float32 · " in header[1]


def test_without_a_terminal_it_writes_lines(saekit, run):
    folder, _ = run
    done = saekit("watch", folder)
    assert done.code == 0
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0].startswith("training 2 x 64 latents, k 4 on ")
    assert lines[-1].startswith("done in ")
    assert any(line.startswith("step 16/16 | ") for line in lines)
    assert saekit("watch", "r", "--save-dir", folder.parent).out == saekit("watch", "--save-dir", folder.parent).out
    assert saekit("watch", folder / "latest").out == done.out


def test_an_older_run_without_a_checkpoint_has_nothing_to_show(saekit, run, tmp_path, monkeypatch):
    monkeypatch.setattr("saekit.cli.watch.LOOKS", 0.0)
    older = without(run[0], tmp_path / "older", **OLDER)
    (older / "latest").unlink()
    done = saekit("watch", older)
    assert done.code == 2
    assert "saved no checkpoint" in done.err


def test_ctrl_c_leaves_at_once(saekit, run, tmp_path, monkeypatch):
    def press(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("saekit.cli.watch.time.sleep", press)
    from saekit.runs.lock import hold

    going_on = without(run[0], tmp_path / "going-on", kinds=("end",))
    with hold(going_on):
        done = saekit("watch", going_on)
    assert (done.code, done.err) == (0, "The run goes on\n")
    assert "done" not in done.out
    done = saekit("watch", tmp_path / "nothing")
    assert (done.code, done.err) == (0, f"No process trains in {tmp_path / 'nothing'}\n")


def test_names_that_lead_nowhere(saekit, tmp_path):
    done = saekit("watch")
    assert (done.code, done.err) == (
        2,
        "Error: there is no run in checkpoints: give a run's folder, or --save-dir\n",
    )
