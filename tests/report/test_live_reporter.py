from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from saekit.report.live_table import spread
from saekit.report.live_view import LiveState, run_view
from saekit.report.pace import Pace
from saekit.report.stats import Lowest
from saekit.report.terminal import LiveReporter


def terminal(width=80, height=24):
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)


def picture(state, width=80, height=24):
    console = terminal(width, height)
    console.print(run_view(state, width, height))
    return console.file.getvalue().splitlines()


@pytest.fixture
def make_state(make_info, make_stats, clock):
    def make(layers, reports=30, names=None, fvu=0.5, **more):
        info = make_info(layers, names=names, **more)
        state = LiveState(info, Pace(info, clock))
        for step in range(1, reports + 1):
            clock.now += 2
            stats = make_stats(step, layers, fvu / step, names=names)
            state.pace.update(stats)
            state = state.after(stats)
        return state

    return make


@pytest.mark.parametrize("with_auxk", [False, True])
@pytest.mark.parametrize("reports", [0, 1, 30])
@pytest.mark.parametrize("layers", [1, 6, 12, 32, 200])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (60, 12), (200, 10)])
def test_view_never_leaves_the_terminal(make_state, layers, reports, width, height, with_auxk):
    lines = picture(make_state(layers, reports, with_auxk=with_auxk), width, height)
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    # The layer that a person looks for first, and the header, are there in every size.
    assert lines[0].startswith("saekit  EleutherAI/pythia-14m on wikitext [train]")
    assert any(line.startswith("layers.0 ") for line in lines)


def test_auxk_has_a_column_where_it_is_on(make_state):
    with_it, without = (picture(make_state(6, with_auxk=on)) for on in (True, False))
    assert [sum("AuxK" in line for line in lines) for lines in (with_it, without)] == [1, 0]
    assert any(line.startswith("layers.1 ") and " 0.800 " in line for line in with_it)
    assert not any(" 0.800 " in line for line in without)


def test_view_keeps_its_height_while_reports_come_in(make_state):
    assert len({len(picture(make_state(32, reports))) for reports in (0, 1, 2, 30)}) == 1


def test_32_layers_on_24_lines_show_a_spread_and_sum_up_the_rest(make_state):
    lines = picture(make_state(32))
    shown = [line.split()[0] for line in lines if line.startswith("layers.")]
    assert (shown[0], shown[-1]) == ("layers.0", "layers.31")
    assert f"… and {32 - len(shown)} layers in between: mean FVU" in "\n".join(lines)
    assert any(line.startswith("all 32 ") for line in lines)


def test_finished_view_has_every_layer(make_state):
    lines = picture(replace(make_state(32), finished=True))
    assert sum(line.startswith("layers.") for line in lines) == 32
    assert "stopped after" in "\n".join(lines)


def test_numbers(make_state):
    lines = picture(make_state(2, reports=10), 100)
    text = "\n".join(lines)
    assert "2 layers × 4,096 latents, k 32" in text
    transcoders = replace(make_state(2), info=replace(make_state(2).info, coder="transcoder"))
    assert "2 transcoders × 4,096 latents, k 32" in "\n".join(picture(transcoders, 100))
    assert "10/1,000 steps" in text
    assert "1.0%" in text
    assert "ETA 33m 00s" in text  # 990 steps of 2 s
    assert "160k tokens of ≤ 16.4M · 12.3k tokens/s · lr 2.0e-04 · 3.0 GiB peak" in text
    row = next(line for line in lines if line.startswith("layers.1"))
    assert row.split()[:5] == ["layers.1", "0.0600", "41", "1.0%", "31.5"]


@pytest.mark.parametrize("layers", [1, 6, 32])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 12), (200, 10)])
def test_an_evaluation_is_one_line(make_state, make_evaluation, layers, width, height):
    """It is there from the start of a run that evaluates, so that nothing jumps."""
    state = make_state(layers)
    without = picture(state, width, height)
    waiting = replace(state, info=replace(state.info, eval_every=100))
    shown = picture(replace(waiting, evaluation=make_evaluation(1200, layers)), width, height)
    assert "not evaluated yet" in "\n".join(picture(waiting, width, height))
    assert len(shown) == len(picture(waiting, width, height)) < height
    assert max(map(len, shown)) <= width
    (line,) = [line for line in shown if line.startswith("evaluated at step 1,200")]
    assert " · FVU 0." in line
    assert not [line for line in without if "evaluated" in line]


@pytest.mark.parametrize("width", [66, 80, 120])
def test_under_a_layer_map_each_layer_has_its_rank(make_state, width):
    state = make_state(3)
    info = replace(
        state.info, placement="layer-map", world_size=2, owners={"layers.0": 0, "layers.1": 1, "layers.2": 1}
    )
    lines = picture(replace(state, info=info), width)
    assert max(map(len, lines)) <= width
    rows = {line.split()[0]: line.split()[1] for line in lines if line.startswith(("layer ", "layers."))}
    assert rows == {"layer": "rank", "layers.0": "0", "layers.1": "1", "layers.2": "1"}
    assert "rank" not in "\n".join(picture(state, width))
    assert " rank " not in "\n".join(picture(replace(state, info=info), 60))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_under_zero3_the_size_of_a_shard_is_shown_whole(make_state, width):
    state = make_state(3)
    info = replace(state.info, placement="zero3", world_size=2, shard_bytes=3 * 2**20)
    lines = picture(replace(state, info=info), width)
    assert max(map(len, lines)) <= width
    assert sum("zero3 on 2 ranks (3 MiB of each SAE), float32" in line for line in lines) == 1


@pytest.mark.parametrize("with_auxk", [False, True])
@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 120])
@pytest.mark.parametrize(
    "names",
    [
        [f"layers.{i}" for i in range(32)],
        [f"layers.{i}.mlp:in" for i in range(32)],
        [f"model.language_model.layers.{i}.self_attn.o_proj" for i in range(32)],
        [f"layers.{i}{side}" for i in range(16) for side in ("", ".mlp:in")],
    ],
    ids=["blocks", "inputs", "deep", "mixed"],
)
def test_a_narrow_terminal_costs_columns_and_not_the_digits_of_layers(make_state, names, width, with_auxk):
    state = replace(make_state(32, names=names, with_auxk=with_auxk), finished=True)
    lines = picture(state, width, 24)
    assert max(map(len, lines)) <= width
    start = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    rows = [line.split() for line in lines[start + 1 : start + 33]]
    assert len({row[0] for row in rows}) == 32
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        assert re.findall(r"\d+", name)[0] in re.findall(r"\d+", row[0])
        assert row[1] == f"{0.5 / 30 + i / 100:.4f}"  # whole, too
    headings = lines[start].split()
    assert headings[:2] == ["layer", "FVU"]
    if width == 40 and names[0] == "layers.0":
        assert headings == ["layer", "FVU", "dead", "FVU", "trend"]
        assert rows[1][2] == "1.0%"
    if width >= 80:
        assert ["L0", "AuxK"][: 1 + with_auxk] == headings[3 : 4 + with_auxk]


@pytest.mark.parametrize("step", [30, 99_999, 100_000])
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_progress_is_whole_on_a_narrow_terminal(make_state, make_stats, width, finished, step):
    state = make_state(6)
    state = replace(state, info=replace(state.info, total_steps=100_000), finished=finished)
    lines = picture(state.after(make_stats(step, 6)), width)
    (line,) = [line for line in lines if f"{step:,}/100,000" in line]
    assert len(line) <= width
    if width >= 40:
        assert "…" not in line
        assert re.search(r"ETA|failed after|stopped after", line)


def test_skipped_steps_are_not_cut_off(make_state, make_stats, tmp_path):
    state = replace(make_state(6), saved=(tmp_path / "step_00012000", 12_000))
    state = state.after(replace(make_stats(12_345, 6), skipped_steps=17))
    for width in (40, 60, 80):
        (line,) = [line for line in picture(state, width) if "saved step 12,000" in line]
        assert re.search(r"17 (of 12,345 steps skipped: NaN or Inf|skipped \(NaN\))$", line)


def test_a_diverged_layer_is_named_with_its_fvu_then_and_now(make_state, make_stats):
    state = make_state(6)
    stats = make_stats(1000, 6)
    worse = replace(stats.layers["layers.4"], fvu=52_000.0)
    stats = replace(
        stats, layers={**stats.layers, "layers.4": worse}, diverged={"layers.4": Lowest(0.3112, 40), "layers.5": None}
    )
    lines = picture(replace(state.after(stats), finished=True), 80)
    assert lines[-1] == "✗ 2 of 6 layers diverged: layers.4 FVU 5.2e+04, was 0.3112 at step 40"
    assert len(picture(state.after(stats), 80, 12)) < 12


@pytest.mark.parametrize(("bad", "saved", "said"), [(0, 1000, "done"), (2, 1000, "failed"), (0, 900, "failed")])
def test_a_run_whose_last_step_was_skipped_or_is_not_saved_is_not_done(make_state, make_stats, bad, saved, said):
    state = replace(make_state(2), saved=(Path(f"step_{saved:08}"), saved))
    ended = replace(state.after(replace(make_stats(1000), bad_in_row=bad)), finished=True)
    assert f"{said} {'in' if said == 'done' else 'after'}" in "\n".join(picture(ended))


def test_long_names_lose_their_beginning(make_state):
    names = [f"model.language_model.transformer.encoder.layers.{i}" for i in range(3)]
    rows = [line for line in picture(make_state(3, names=names)) if "yers.2" in line]
    assert len(rows) == 1
    assert rows[0].startswith("…")


def test_brackets_in_a_name_are_no_markup(make_state):
    assert any(line.startswith("[red]layers[/red] ") for line in picture(make_state(1, names=["[red]layers[/red]"])))


def test_nan_is_shown_not_hidden(make_state):
    lines = picture(make_state(32, fvu=math.nan))
    assert "nan" in next(line for line in lines if line.startswith("layers.0"))


def test_spread_is_even_and_without_repeats():
    for n in range(1, 50):
        for room in range(1, 60):
            rows = spread(n, room)
            assert rows == sorted(set(rows))
            assert len(rows) == min(n, room)
            assert room == 1 or (rows[0], rows[-1]) == (0, n - 1)
    assert spread(3, 0) == []


def test_whole_life(make_info, make_stats, tmp_path):
    console = terminal()
    reporter = LiveReporter(console)
    reporter.status("Loading [the] model")
    reporter.start(make_info(32))
    reporter.step(make_stats(1, 32))
    reporter.saved(tmp_path / "step_00000001", 1)
    reporter.status("a line above")
    reporter.finish()
    reporter.finish()
    written = console.file.getvalue()
    assert "Loading [the] model" not in written.rsplit("a line above", 1)[1]
    assert "✓ saved step 1 in step_00000001" in written
    # The last picture has every layer, and the cursor is back.
    last = written.rsplit("saekit  Eleuther", 1)[1]
    assert all(f"layers.{i} " in last for i in range(32))
    assert written.rstrip("\n").endswith("\x1b[?25h")


def test_finish_without_start_leaves_nothing(make_stats):
    console = terminal()
    reporter = LiveReporter(console)
    reporter.finish()
    assert console.file.getvalue() == ""
    reporter = LiveReporter(console)
    reporter.step(make_stats(1))
    reporter.finish()
    reporter.finish()
    assert console.file.getvalue() == ""


def test_lines_before_the_start_stay_and_move_no_cursor():
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system=None)
    reporter = LiveReporter(console)
    reporter.status("Loading [the] model")
    reporter.status("Warning: short dataset")
    reporter.finish()
    assert console.file.getvalue() == "Loading [the] model\nWarning: short dataset\n"


def test_messages_break_between_words():
    console = terminal(40)
    path = "/somewhere/deep/in/a/file-system/there/is/a/folder"
    LiveReporter(console).status(f"Warning: {path} is nearly full, and what is written there may be lost")
    lines = console.file.getvalue().splitlines()
    assert lines == ["Warning:", path, "is nearly full, and what is written", "there may be lost"]


def test_pace_smooths_and_counts_down(make_info, make_stats, clock):
    pace = Pace(make_info(start_step=100), clock)
    assert pace.seconds_left() is None
    assert pace.tokens_per_second is None
    clock.now += 10
    pace.update(make_stats(110))
    assert pace.seconds_left() == pytest.approx(890)
    clock.now += 5
    assert pace.seconds_left() == pytest.approx(885)
    clock.now += 15
    pace.update(make_stats(120))  # 2 s a step now: the mean is 1.5
    assert pace.seconds_left() == pytest.approx(880 * 1.5)
    assert pace.seconds_gone() == pytest.approx(30)


def test_evaluations_do_not_slow_the_steps_and_the_next_ones_are_waited_for(
    make_info, make_stats, make_evaluation, clock
):
    pace = Pace(replace(make_info(), eval_every=300), clock)  # of 1,000 steps: after 300, 600, 900 and 1,000
    for step in range(1, 300):
        clock.now += 2
        pace.update(make_stats(step))
    assert pace.seconds_left() == pytest.approx(701 * 2)
    clock.now += 2 + 3
    pace.pause(make_evaluation(300))
    pace.update(make_stats(300))
    assert pace.seconds_left() == pytest.approx(700 * 2 + 3 * 3)
    clock.now += 2
    pace.update(make_stats(1000))
    assert pace.seconds_left() == 0
