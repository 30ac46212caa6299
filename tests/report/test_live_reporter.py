from __future__ import annotations

import io
import math
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from saekit.report.live_view import LiveState, run_view, spread
from saekit.report.stats import Pace
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
    assert f"… and {32 - len(shown)} between these: mean FVU" in "\n".join(lines)
    assert any(line.startswith("all 32 ") for line in lines)


def test_finished_view_has_every_layer(make_state):
    lines = picture(replace(make_state(32), finished=True))
    assert sum(line.startswith("layers.") for line in lines) == 32
    assert "stopped after" in "\n".join(lines)


def test_numbers(make_state):
    lines = picture(make_state(2, reports=10), 100)
    text = "\n".join(lines)
    assert "2 layers × 4,096 latents, k 32" in text
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
