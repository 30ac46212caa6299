from __future__ import annotations

import json
import math
import resource
from contextlib import contextmanager

import pytest

from saekit.errors import UserError
from saekit.runs.metrics import END, EVALUATION, START, JsonlReporter, read_metrics, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def record_run(path, info, stats):
    reporter = JsonlReporter(path)
    reporter.start(info)
    for one in stats:
        reporter.step(one)
    reporter.finish()


def test_record(path, make_info, make_stats):
    reporter = JsonlReporter(path)
    reporter.status("nothing")
    reporter.start(make_info())
    reporter.step(make_stats(3))
    (record,) = read_metrics(path)  # there before the run ends
    (start,) = read_metrics(path, START)
    assert read_metrics(path, END) == []
    reporter.finish()
    reporter.finish()
    (end,) = read_metrics(path, END)
    assert (start["step"], end["step"]) == (0, 3)
    assert {"model", "total_steps", "latents", "owners"} < start["run"].keys()
    assert not {"config", "run_dir"} & start["run"].keys()
    assert record.pop("time") > 1.6e9
    assert record == {
        "step": 3,
        "tokens": 48_000,
        "tokens_per_second": 12_345.6,
        "learning_rate": 2e-4,
        "memory_bytes": 3 * 2**30,
        "skipped_steps": 0,
        "bad_in_row": 0,
        "diverged": {},
        "layers": {
            "layers.0": layer(fvu=0.5, dead=0, dead_fraction=0.0, auxk_loss=0.0),
            "layers.1": layer(fvu=0.51, dead=41, dead_fraction=41 / 4096, auxk_loss=0.8),
        },
    }


def layer(**numbers):
    return {"l0": 31.5, "num_latents": 4096, "loss": 0.6, "multi_topk_fvu": None, "too_long": 0.004, **numbers}


def test_a_fresh_run_starts_an_empty_file(path, make_info, make_stats):
    record_run(path, make_info(), [make_stats(1), make_stats(2)])
    record_run(path, make_info(), [make_stats(7)])
    assert [record["step"] for record in read_metrics(path)] == [7]


def test_a_resumed_run_has_each_step_once(path, make_info, make_stats):
    record_run(path, make_info(), [make_stats(step) for step in (10, 20, 30)])
    with path.open("ab") as file:
        file.write(b'{"step": 40, "tok\xc3')  # killed while writing
    record_run(path, make_info(start_step=20), [make_stats(step) for step in (30, 40)])
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 30, 40]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_each_process_that_trained_the_run_has_a_start(path, make_info, make_stats):
    record_run(path, make_info(), [make_stats(step) for step in (10, 20, 30)])
    record_run(path, make_info(start_step=20), [make_stats(30)])
    record_run(path, make_info(start_step=30), [make_stats(40)])
    kinds = [(each.get("kind"), each["step"]) for each in read_records(path)]
    first = [(START, 0), (None, 10), (None, 20)]  # its end, after step 30, is repeated by the second
    assert kinds == [*first, (START, 20), (None, 30), (END, 30), (START, 30), (None, 40), (END, 40)]


def test_a_resumed_run_without_a_file(path, make_info, make_stats):
    record_run(path, make_info(start_step=20), [make_stats(30)])
    assert [record["step"] for record in read_metrics(path)] == [30]


def test_nan_and_infinity_are_null(path, make_info, make_stats):
    record_run(path, make_info(), [make_stats(1, fvu=math.nan), make_stats(2, fvu=math.inf)])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    records = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [each["layers"]["layers.0"]["fvu"] for each in records if "layers" in each] == [None, None]


def test_a_torn_last_line_is_left_out_but_no_other(path, make_info, make_stats):
    record_run(path, make_info(), [make_stats(1), make_stats(2)])
    whole = b"".join(line for line in path.read_bytes().splitlines(keepends=True) if b'"kind"' not in line)
    path.write_bytes(whole[:-20])
    assert [record["step"] for record in read_metrics(path)] == [1]
    path.write_bytes(b"not json\n" + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        read_metrics(path)


@contextmanager
def full_disk(size):
    """Lets files grow no further than so many bytes: the system call fails, amid a line if need be.

    It holds for all files of this process, the one that pytest prints to included: keep it short.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run(path, make_info, make_stats):
    reporter = JsonlReporter(path)
    reporter.start(make_info())
    reporter.step(make_stats(1))
    with (
        full_disk(path.stat().st_size + 100),
        pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(File too large\)"),
    ):
        reporter.step(make_stats(2))
    reporter.finish()
    assert path.read_bytes().endswith(b"}\n")
    assert [record["step"] for record in read_metrics(path)] == [1]
    assert [record["step"] for record in read_metrics(path, END)] == [2]


def test_with_best_effort_lines_are_written_when_there_is_space_again(path, make_info, make_stats):
    said = []
    reporter = JsonlReporter(path, said.append)
    reporter.start(make_info())
    reporter.step(make_stats(1))
    with full_disk(path.stat().st_size + 100):
        reporter.step(make_stats(2))
        reporter.step(make_stats(3))
    assert [record["step"] for record in read_metrics(path)] == [1]
    (warning,) = said
    assert warning.startswith("Warning: ")
    assert "File too large" in warning
    reporter.step(make_stats(4))
    reporter.finish()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert path.read_bytes().count(b"\n") == 1 + 4 + 1


def test_evaluations_are_records_of_their_own(path, make_info, make_stats, make_evaluation):
    reporter = JsonlReporter(path)
    reporter.start(make_info())
    for step in (10, 20, 30):
        reporter.evaluated(make_evaluation(step, fvu=math.nan if step == 20 else 0.25))
        reporter.step(make_stats(step))
    reporter.finish()
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 30]
    found = read_metrics(path, EVALUATION)
    assert [(record["kind"], record["step"], record["seconds"]) for record in found] == [
        ("evaluation", step, 3.0) for step in (10, 20, 30)
    ]
    assert found[0]["evaluation"] == make_evaluation(10).record
    assert found[1]["evaluation"]["layers"][1]["reconstruction"]["fvu"] == {"value": None, "low": None, "high": None}
    reporter.start(make_info(start_step=20))
    reporter.finish()
    assert [record["step"] for record in read_metrics(path, EVALUATION)] == [10, 20]
