"""What `saekit doctor` makes of what ranks say; the ranks are faked."""

from dataclasses import replace

import pytest

from saekit.doctor import launched
from saekit.doctor.watch import Place
from saekit.placement.trial import About, Seen

ONE = About(0, "a", "cuda H100", "gpu0", "nccl", "gloo", 2, frozenset({0, 1}), {"torch": "2.13.0"})


def ranks(*changes):
    return (
        [replace(ONE, rank=rank, device_id=f"gpu{rank}") for rank in range(2)]
        if not changes
        else [
            replace(ONE, **{"rank": rank, "device_id": f"gpu{rank}", **change}) for rank, change in enumerate(changes)
        ]
    )


def only(findings):
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        (({}, {}), "ok", "cuda H100: ranks 0-1"),
        (({}, {"device_id": "gpu0"}), "problem", "shared: a's GPU gpu0: ranks 0-1"),
        (({}, {"device_id": "gpu0", "host": "b"}), "ok", "cuda H100: ranks 0-1"),
        (({}, {"device": "cpu", "device_id": None}), "problem", "cuda H100: rank 0; cpu: rank 1"),
        (({}, {"device": "cuda A100"}), "note", "cuda H100: rank 0; cuda A100: rank 1"),
    ],
)
def test_devices(changes, state, words):
    found = only(launched.devices(ranks(*changes)))
    assert (found.state, found.found) == (state, words)
    assert (found.remedy is None) == (state == "ok")


def test_backends():
    assert only(launched.backends(ranks())).state == "ok"
    assert only(launched.backends(ranks({}, {"backend": "gloo"}))).state == "problem"
    on_cpu = {"device": "cpu", "device_id": None, "backend": "gloo"}
    assert only(launched.backends(ranks(on_cpu, on_cpu))).state == "ok"


def test_ranks_that_share_a_core():
    """`srun` of SLURM 22.05 and newer gives each task one core unless it is told."""
    one = {"cores": frozenset({3}), "threads": 1}
    found = only(launched.cores(ranks(one, one)))
    assert found.state == "problem"
    assert "2 ranks with 2 threads on 1 core" in found.found
    assert "SRUN_CPUS_PER_TASK" in found.remedy
    assert only(launched.cores(ranks())).remedy == "export OMP_NUM_THREADS=1"
    assert [each.state for each in launched.cores(ranks({}, {"host": "b"}))] == ["ok", "ok"]


def test_a_collective_that_gives_wrong_numbers():
    assert only(launched.collective("all_reduce", [None, None])).state == "ok"
    found = only(launched.collective("all_reduce", [None, "got [1.0], expected [3.0]"]))
    assert (found.state, found.found) == ("problem", "wrong result: rank 1: got [1.0], expected [3.0]")


def test_speed():
    assert only(launched.fast("all_reduce", 2e9, "hint")).state == "ok"
    found = only(launched.fast("all_reduce", 1e6, "hint"))
    assert (found.state, found.remedy) == ("note", "hint")


def test_folders():
    same, other, closed = Seen("/d", True, None), Seen("/e", False, None), Seen("/d", True, "Permission denied")
    about = ranks({}, {"host": "b"})
    assert only(launched.shared("save-dir", about, [same, same])).state == "ok"
    found = only(launched.shared("save-dir", about, [same, other]))
    assert (found.state, found.found) == ("problem", "rank 1 (b) does not see rank 0's /d")
    assert only(launched.shared("data sets", about, [same, other])).state == "note"
    found = only(launched.shared("data sets", about, [same, closed]))
    assert (found.state, found.found) == ("problem", "cannot be written: /d (Permission denied): rank 1")


def test_clocks():
    assert only(launched.clocks(ranks(), [0.0, -0.2])).state == "ok"
    found = only(launched.clocks(ranks({}, {"host": "b"}), [0.0, -7.0]))
    assert (found.state, found.found) == ("note", "b (rank 1) differs from rank 0 by -7.0 s")


def test_versions():
    assert only(launched.versions(ranks())).found == "the same on every rank: torch 2.13.0"
    found = only(launched.versions(ranks({}, {"versions": {"torch": "2.13.0", "deepspeed": "0.19"}})))
    assert (found.name, found.found) == ("deepspeed", "none: rank 0; 0.19: rank 1")


def test_who_waits_where():
    places = [Place("all_reduce", None), None, Place("all_reduce", None), Place("join", None)]
    assert list(launched.waiting(places)) == [
        "ranks 0, 2 are at all_reduce",
        "rank 1 is not connected",
        "rank 3 is at join",
    ]
    assert launched.named([5, 0, 1, 2]) == "ranks 0-2, 5"
