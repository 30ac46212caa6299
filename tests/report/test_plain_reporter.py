from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from saekit.report.plain import PlainReporter
from saekit.report.stats import Lowest
from saekit.report.terminal import LiveReporter, terminal_reporter


def test_lines_are_rare_and_the_last_one_is_there(make_info, make_stats, clock, tmp_path):
    stream = io.StringIO()
    reporter = PlainReporter(stream, every=5, clock=clock)
    reporter.status("loading")
    reporter.start(make_info())
    for step in range(1, 13):
        clock.now += 1
        reporter.step(make_stats(step))
    reporter.saved(tmp_path / "step_00000012", 12)
    reporter.finish()
    reporter.finish()
    lines = stream.getvalue().splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["1/1,000", "6/1,000", "11/1,000", "12/1,000"]
    assert lines[0] == "loading"
    assert lines[2] == (
        "step 1/1,000 | 16.0k tokens | 12.3k tok/s | ETA 16m 39s | lr 2.0e-04 | FVU 0.5050 | "
        "worst layers.1 0.5100 | dead 0.5%"
    )
    assert f"saved step 12 in {tmp_path / 'step_00000012'}" in lines
    assert [line.split() for line in lines[-4:-1]] == [
        ["layer", "FVU", "dead", "L0"],
        ["layers.0", "0.5000", "0", "0.0%", "31.5"],
        ["layers.1", "0.5100", "41", "1.0%", "31.5"],
    ]
    assert lines[-1] == "stopped after 12s"


def test_auxk_has_a_column_where_it_is_on(make_info, make_stats):
    stream = io.StringIO()
    reporter = PlainReporter(stream)
    reporter.start(make_info(with_auxk=True))
    reporter.step(make_stats(1))
    reporter.finish()
    assert [line.split() for line in stream.getvalue().splitlines()[-4:-1]] == [
        ["layer", "FVU", "dead", "L0", "AuxK"],
        ["layers.0", "0.5000", "0", "0.0%", "31.5", "0.0000"],
        ["layers.1", "0.5100", "41", "1.0%", "31.5", "0.8000"],
    ]


@pytest.mark.parametrize(("activation", "says"), [("topk", "k 32 on"), ("batchtopk", "k 32 (batchtopk) on")])
def test_what_is_trained(make_info, activation, says):
    stream = io.StringIO()
    PlainReporter(stream).start(make_info(activation=activation))
    assert f"training 2 x 4,096 latents, {says} EleutherAI/pythia-14m with" in stream.getvalue()


@pytest.mark.parametrize(
    ("coder", "layers", "says"),
    [
        ("transcoder", 2, "training 2 transcoders x 4,096 latents, k 32 on EleutherAI"),
        ("crosscoder", 1, "training 1 crosscoder x 4,096 latents, k 32 on EleutherAI"),
    ],
)
def test_other_coders_are_called_by_their_names(make_info, coder, layers, says):
    stream = io.StringIO()
    PlainReporter(stream).start(make_info(layers, coder=coder, shard_bytes=2**20))
    assert says in stream.getvalue()
    assert f"(1 MiB of each {coder})" in stream.getvalue()


def test_evaluations_are_lines_of_their_own(make_info, make_stats, make_evaluation):
    stream = io.StringIO()
    reporter = PlainReporter(stream)
    reporter.start(make_info())
    reporter.evaluated(make_evaluation(1000))
    reporter.evaluated(make_evaluation(2000, layers=1, head=False))
    assert stream.getvalue().splitlines()[1:] == [
        "evaluated step 1,000 in 3s | FVU 0.2550 | CE recovered 0.8500 | KL 2.0000 | all at once 0.5000, KL 2.0000 | "
        "worst FVU 0.2600 in layers.1",
        "evaluated step 2,000 in 3s | FVU 0.2500",
    ]


def test_ranks_and_what_they_hold(make_info):
    stream = io.StringIO()
    owners = {"layers.0": 0, "layers.1": 0, "layers.2": 2, "layers.3": 0}
    info = replace(make_info(layers=4), placement="layer-map", world_size=3, owners=owners)
    PlainReporter(stream).start(info)
    assert "cpu, layer-map on 3 ranks, float32" in stream.getvalue()
    assert "rank 0: layers.0, layers.1, layers.3; rank 1: none; rank 2: layers.2" in stream.getvalue()
    assert "rank" not in make_info().layout


def test_under_zero3_the_size_of_a_shard(make_info):
    stream = io.StringIO()
    PlainReporter(stream).start(replace(make_info(), placement="zero3", world_size=2, shard_bytes=3 * 2**20))
    assert "cpu, zero3 on 2 ranks (3 MiB of each SAE), float32" in stream.getvalue()


def test_a_report_that_was_written_is_not_repeated(make_info, make_stats):
    stream = io.StringIO()
    reporter = PlainReporter(stream)
    reporter.start(make_info())
    reporter.step(make_stats(1000))
    reporter.saved(Path("step_00001000"), 1000)
    reporter.finish()
    assert stream.getvalue().count("step 1,000/1,000") == 1
    assert "done in 0s" in stream.getvalue()


@pytest.mark.parametrize(
    ("bad", "diverged", "saved", "said"),
    [
        (0, {}, 1000, "done in 0s"),
        (0, {}, None, "failed after 0s"),
        (0, {}, 900, "failed after 0s"),
        (
            0,
            {"layers.1": Lowest(0.3, 40)},
            1000,
            "done in 0s, but 1 of 2 layers diverged: layers.1 FVU 1.5100, was 0.3000 at step 40",
        ),
        (3, {}, 1000, "failed after 0s"),
    ],
)
def test_how_it_ended(make_info, make_stats, clock, bad, diverged, saved, said):
    stream = io.StringIO()
    reporter = PlainReporter(stream, clock=clock)
    reporter.start(make_info())
    if saved == 900:
        reporter.saved(Path("step_00000900"), saved)
    reporter.step(replace(make_stats(1000, fvu=1.5), bad_in_row=bad, diverged=diverged))
    if saved == 1000:
        reporter.saved(Path("step_00001000"), saved)
    reporter.finish()
    *_, last = stream.getvalue().splitlines()
    assert last == said


def test_no_escape_codes_and_no_exotic_characters(make_info, make_stats):
    buffer = io.BytesIO()
    ascii_stream = io.TextIOWrapper(buffer, encoding="ascii", write_through=True)
    reporter = PlainReporter(Console(file=ascii_stream, force_terminal=True))
    reporter.status("bölük…")
    reporter.start(make_info(names=["schicht.ä"]))
    reporter.step(make_stats(1, names=["schicht.ä"], fvu=math.nan))
    reporter.finish()
    written = buffer.getvalue()
    assert b"\x1b" not in written
    assert b"b\\xf6l\\xfck..." in written
    assert b"worst schicht.\\xe4 nan" in written


def test_finish_without_anything():
    stream = io.StringIO()
    PlainReporter(stream).finish()
    assert stream.getvalue() == ""


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def no_ci(monkeypatch):
    for name in ("CI", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_live_on_a_terminal(no_ci):
    assert isinstance(terminal_reporter(Console(file=Tty())), LiveReporter)


@pytest.mark.parametrize("setting", [("CI", "true"), ("TERM", "dumb")])
def test_plain_where_nobody_watches(no_ci, monkeypatch, setting):
    monkeypatch.setenv(*setting)
    assert isinstance(terminal_reporter(Console(file=Tty())), PlainReporter)


def test_plain_for_a_pipe_even_with_forced_colors(no_ci, monkeypatch):
    assert isinstance(terminal_reporter(Console(file=io.StringIO())), PlainReporter)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(terminal_reporter(Console(file=io.StringIO())), PlainReporter)


def test_plain_for_an_encoding_without_blocks(no_ci):
    stream = Tty()
    stream.encoding = "ascii"
    assert isinstance(terminal_reporter(Console(file=stream)), PlainReporter)


def test_progress_goes_to_stderr(no_ci, capsys, make_info):
    terminal_reporter().start(make_info())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("training 2 x 4,096 latents")
