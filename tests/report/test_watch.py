"""A run as its files tell it, also while they change."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.errors import UserError
from saekit.report.live_table import TREND_REPORTS
from saekit.report.stats import Lowest
from saekit.runs.follow import LeaseWatch, MetricsTail
from saekit.runs.lease import EXPIRES, Writer, read_lease, write_lease
from saekit.runs.lock import hold
from saekit.runs.metrics import END, EVALUATION, START, JsonlReporter, as_evaluation, as_record, as_start, plain
from saekit.runs.records import evaluation_of, info_of, stats_of
from saekit.runs.watch import Watch, find_run


class Recorder:
    """Notes what it is told; several share the notes."""

    def __init__(self, told):
        self.told = told

    def start(self, info):
        self.told.append(("start", info.start_step))

    def step(self, stats):
        self.told.append(("step", stats.step))

    def evaluated(self, stats):
        self.told.append(("evaluated", stats.step))

    def saved(self, path, step):
        self.told.append(("saved", path.name, step))

    def status(self, message):
        self.told.append(("status", message))

    def note(self, text):
        if text:
            self.told.append(("note", text))

    def finish(self):
        self.told.append(("finish",))

    def leave(self):
        self.told.append(("leave",))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def look(run):
    """`look()` returns whether the run has ended, and what was told since the last look."""
    told = []
    watch = Watch(run, lambda clock: Recorder(told))

    def call():
        told.clear()
        return watch.look(), list(told)

    call.watch = watch
    return call


def writer_elsewhere(run, pid=7, since=10):
    """A lease of another machine, taken some seconds ago."""
    writer = Writer("node7", "another", pid, "then", time.time() - since, f"token{pid}")
    write_lease(run / ".lock", writer)
    return writer


def write(run, *records):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def begun(run, make_info, make_stats):
    """The run of another machine has reported two steps."""
    writer_elsewhere(run)
    now = time.time()
    write(run, as_start(make_info(), now - 3), *(as_record(make_stats(step), now - 3 + step) for step in (1, 2)))


def test_records_come_back_as_they_were(make_info, make_stats, make_evaluation, tmp_path):
    info = make_info(owners={"layers.0": 0, "layers.1": 1}, shard_bytes=3, eval_every=5, coder="transcoder")
    bad = replace(make_stats(9).layers["layers.0"], fvu=math.nan, multi_topk_fvu=0.5)
    stats = replace(
        make_stats(9, fvu=0.25), bad_in_row=2, skipped_steps=3, diverged={"layers.0": None, "layers.1": Lowest(0.2, 4)}
    )
    stats = replace(stats, layers={**stats.layers, "layers.0": bad})
    evaluation = make_evaluation(9, fvu=math.nan)

    def through_json(record):
        return json.loads(json.dumps(record, allow_nan=False))

    assert info_of(through_json(as_start(info, 1.0)), tmp_path / "run") == replace(info, config={})
    found = stats_of(through_json(as_record(stats, 1.0)))
    assert repr(found) == repr(stats)  # NaN is not itself
    again = evaluation_of(through_json(as_evaluation(evaluation, 1.0)))
    assert math.isnan(again.of_layers("fvu")["layers.0"])
    assert plain(again.record) == plain(evaluation.record)
    assert again.summary == evaluation.summary


def test_a_start_by_a_version_with_other_fields(make_info, tmp_path):
    record = as_start(make_info(), 1.0)
    later = {**record, "run": {**record["run"], "mood": "good"}}
    assert info_of(later, tmp_path / "run") == replace(make_info(), config={})
    del record["run"]["total_steps"]
    with pytest.raises(UserError, match="another version of saekit"):
        info_of(record, tmp_path / "run")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return tmp_path_factory.mktemp("recorded") / "metrics.jsonl"


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 4000), max_size=12))
def test_a_file_that_grows_in_any_pieces_gives_each_record_once(recorded, cuts):
    lines = [json.dumps({"step": step, "text": "é" * step}, ensure_ascii=False) + "\n" for step in range(20)]
    whole = "".join(lines).encode()
    recorded.unlink(missing_ok=True)
    tail, steps = MetricsTail(recorded), []
    for end in [*sorted(cuts), len(whole)]:
        recorded.write_bytes(whole[:end])
        news = tail.news()
        assert not news.replaced
        steps += [record["step"] for record in news.records]
    assert steps == list(range(20))


def test_a_file_that_is_replaced_is_read_again(run, make_info, make_stats):
    """Also by one that is longer by the time it is looked at."""
    path = run / "metrics.jsonl"
    tail = MetricsTail(path)
    assert not tail.news().replaced
    first = JsonlReporter(path)
    first.start(make_info())
    for step in (1, 2, 3):
        first.step(make_stats(step))
    first._close()  # killed
    news = tail.news()
    assert (news.start["step"], [record["step"] for record in news.records]) == (0, [1, 2, 3])
    for resumed_at, then in ((2, (3,)), (2, (3, 4, 5, 6))):
        again = JsonlReporter(path)
        again.start(make_info(start_step=resumed_at))
        for step in then:
            again.step(make_stats(step))
        again._close()
        news = tail.news()
        assert news.replaced
        assert (news.start["step"], [record["step"] for record in news.records]) == (2, list(then))
    path.unlink()
    assert tail.news().replaced
    assert not tail.news().replaced


def test_of_a_long_run_only_the_newest_is_read(run, make_stats, make_evaluation):
    steps = [as_record(make_stats(step), float(step)) for step in range(1, 1001)]
    write(run, *steps[:500], as_evaluation(make_evaluation(500), 500.0), *steps[500:])
    records = MetricsTail(run / "metrics.jsonl").news().records
    assert [record.get("kind") for record in records] == [EVALUATION] + [None] * TREND_REPORTS
    assert [record["step"] for record in records] == [500, *range(1001 - TREND_REPORTS, 1001)]


def test_a_line_that_is_no_record_gets_a_second_chance(run, make_stats):
    """A network file system can show a file's length before its content."""
    path = run / "metrics.jsonl"
    good = (json.dumps(as_record(make_stats(1), 1.0)) + "\n").encode()
    for later in (good, None):
        tail = MetricsTail(path)
        path.write_bytes(b"\0" * (len(good) - 1) + b"\n" + good)
        assert tail.news().records == []
        if later:
            path.write_bytes(good + good)
            assert [record["step"] for record in tail.news().records] == [1, 1]
        else:
            with pytest.raises(UserError, match=r"metrics\.jsonl: a line is not a record;"):
                tail.news()


def test_a_run_that_has_yet_to_start(look, run, make_info, make_stats):
    run.rmdir()
    assert look() == (False, [("status", f"Waiting for {run}: there is no such folder yet")])
    assert look() == (False, [])
    with hold(run):
        process = f"process {os.getpid()} on {read_lease(run / '.lock').host}"
        assert look() == (False, [("status", f"Waiting for the first step: {process} is preparing {run}")])
        write(run, as_start(make_info(), time.time()))
        assert look() == (False, [("start", 0)])
        write(run, as_record(make_stats(1), time.time()))
        assert look() == (False, [("step", 1)])
        assert look.watch.leave() == "The run goes on"


@pytest.mark.parametrize("says_so", [True, False])
def test_a_run_that_ends(look, run, begun, says_so):
    assert look() == (False, [("start", 0), ("step", 1), ("step", 2)])
    (run / "step_00000002").mkdir()
    (run / "latest").symlink_to("step_00000002")
    assert look() == (False, [("saved", "step_00000002", 2)])
    if says_so:
        write(run, {"kind": END, "step": 2, "time": time.time()})
        assert look() == (False, [])  # the process is closing its files
        (run / ".lock").unlink()
        assert look() == (True, [("finish",)])
        assert look.watch.leave().startswith("No process")
    else:  # the disk was full; two looks, as the file may be a moment late
        (run / ".lock").unlink()
        assert look() == (False, [])
        assert look() == (True, [("finish",)])


def test_a_run_that_was_killed_here(look, run, begun):
    dead = replace(Writer.here(), started="an earlier process", pid=os.getpid())
    write_lease(run / ".lock", dead)
    ended, told = look()
    assert not ended
    (note,) = (each[1] for each in told if each[0] == "note")
    at = time.strftime(
        "%H:%M:%S", time.localtime(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["time"])
    )
    assert note == f"no report since {at}; process {dead.pid} on {dead.host} was killed or crashed"
    assert look() == (False, [("note", note)])
    assert look.watch.leave().startswith(f"No process trains in {run}: it has no checkpoint yet")


def test_a_run_that_was_killed_elsewhere(run, begun, clock):
    """By this machine's clock, and not by the file server's, which may be an hour off."""
    os.utime(run / ".lock", (time.time() + 3600, time.time() + 3600))
    lease = LeaseWatch(run, clock)
    assert lease.look().alive
    clock.now += EXPIRES - 1
    assert lease.look().alive
    clock.now += 2
    assert not lease.look().alive
    os.utime(run / ".lock", (time.time() + 3700, time.time() + 3700))
    assert lease.look().alive
    os.utime(run / ".lock", (time.time() - 3600, time.time() - 3600))
    assert not LeaseWatch(run, clock).look().alive  # what it was before is by the clocks
    (run / ".lock").write_text("broken")
    assert lease.look().alive  # somebody holds it


def test_a_killed_run_that_is_resumed_is_shown_anew(look, run, begun, make_info, make_stats):
    look()
    os.utime(run / ".lock", (1.0, 1.0))
    look.watch._lease._renewed = None  # as if it had been looked at for a minute
    _, told = look()
    assert told[0][1].endswith("process 7 on node7 was killed, or has lost its disk")
    writer_elsewhere(run, pid=8, since=0)
    assert look()[1] == [("note", "process 8 on node7 is about to resume the run")]
    reporter = JsonlReporter(run / "metrics.jsonl")
    reporter.start(make_info(start_step=1))
    reporter.step(make_stats(2))
    reporter._close()
    assert look() == (False, [("finish",), ("start", 1), ("step", 2)])


def test_a_run_that_is_silent_but_lives(look, run, make_info, make_stats):
    writer_elsewhere(run)
    then = time.time() - 600
    write(run, as_start(make_info(), then - 2), as_record(make_stats(1), then))
    _, told = look()
    # The writer took its lease after that: it resumes.
    assert told[-1] == ("note", "process 7 on node7 is about to resume the run")
    write_lease(run / ".lock", replace(read_lease(run / ".lock"), since=then - 10))
    _, told = look()
    assert told[-1][1].endswith("; process 7 on node7 is still running")
    write(run, as_record(make_stats(2), time.time()))
    assert look()[1] == [("step", 2)]


def test_watching_changes_nothing(look, run, begun):
    def state():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in [*run.iterdir()]}, run.stat().st_mtime_ns

    before = state()
    for _ in range(3):
        look()
    assert state() == before


def test_the_run_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "checkpoints"
    with pytest.raises(UserError, match="there is no run in checkpoints"):
        find_run(None, runs.relative_to(tmp_path))
    for age, name, file in ((3, "old", "metrics.jsonl"), (1, "new", ".lock"), (2, "both", "metrics.jsonl")):
        (runs / name).mkdir(parents=True)
        (runs / name / file).touch()
        os.utime(runs / name / file, (1e9 - age, 1e9 - age))
    (runs / "no-run").mkdir()
    (runs / "file").touch()
    (runs / "old" / "step_00000003").mkdir()

    def found(name):
        return find_run(None if name is None else tmp_path.__class__(name), runs)

    assert found(None) == runs / "new"
    assert found("old") == runs / "old"
    assert found(runs / "old") == runs / "old"
    assert found("checkpoints/old/step_00000003").resolve() == runs / "old"
    assert found("later") == runs / "later"  # it may come
    assert found("elsewhere/later") == tmp_path.__class__("elsewhere/later")
    with pytest.raises(UserError, match="file is a file"):
        found(runs / "file")


def test_kinds_of_records_are_told_apart_by_their_beginning(make_info, make_evaluation):
    for kind, record in ((START, as_start(make_info(), 1.0)), (EVALUATION, as_evaluation(make_evaluation(1), 1.0))):
        assert json.dumps(record).startswith(f'{{"kind": "{kind}"')
