"""What a process may have of a machine, in containers within containers."""

from types import SimpleNamespace

import pytest

from saekit import machine
from saekit.planning import detect

GIB = 2**30


def test_the_cpus_name(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: fpu\n")
    assert machine.cpu_model(listing) == "Some CPU @ 3 GHz"
    assert machine.cpu_model(tmp_path / "missing")


def test_versions_are_looked_up_once(monkeypatch):
    found = machine.library_versions()
    expected = dict(found)
    found.clear()
    monkeypatch.setattr(machine, "version", None)
    assert machine.library_versions() == expected
    assert {"python", "saekit", "torch", "transformers"} <= expected.keys()


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def groups(tmp_path, line):
    own = tmp_path / "own"
    own.write_text(f"{line}\n")
    return tmp_path / "cgroup", own


def test_memory_limit_of_a_container(tmp_path):
    root, own = groups(tmp_path, "0::/job/step")
    write(root / "job" / "step", memory__max="max", memory__current="1")
    write(
        root / "job",
        memory__max=str(8 * GIB),
        memory__current=str(6 * GIB),
        memory__stat=f"anon 1\ninactive_file {GIB}\n",
    )
    assert machine.memory_limit(64 * GIB, root, own) == (8 * GIB, 3 * GIB)
    assert machine.memory_limit(4 * GIB, root, own) is None


def test_memory_limit_of_an_old_kernels_container(tmp_path):
    root, own = groups(tmp_path, "4:memory:/docker/abc")
    # What a container sees of its own group may lie at the top.
    write(
        root / "memory",
        memory__limit_in_bytes=str(2 * GIB),
        memory__usage_in_bytes=str(GIB),
        memory__stat="inactive_file 7\ntotal_inactive_file 9\n",
    )
    assert machine.memory_limit(64 * GIB, root, own) == (2 * GIB, GIB + 9)


def test_no_control_groups(tmp_path):
    assert machine.memory_limit(GIB, tmp_path / "nothing", tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("line", "folder", "files", "cores"),
    [
        ("0::/job", "job", {"cpu__max": "150000 100000"}, 2),
        ("0::/job", "job", {"cpu__max": "max 100000"}, 16),
        ("3:cpu,cpuacct:/job", "cpu/job", {"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "100000"}, 1),
        ("3:cpu,cpuacct:/job", "cpu/job", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, 16),
        ("3:cpu,cpuacct:/job", "cpu/job", {"cpu__cfs_quota_us": "1000", "cpu__cfs_period_us": "100000"}, 1),
    ],
)
def test_cores_that_a_container_may_use(monkeypatch, tmp_path, line, folder, files, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical: 32)
    root, own = groups(tmp_path, line)
    write(root / folder, **files)
    assert machine.usable_cores(root, own) == (cores, cores)


def test_cores_that_run_two_threads_count_once(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical: 8)
    assert machine.usable_cores(tmp_path, tmp_path / "missing") == (8, 16)


def test_the_tightest_of_nested_limits_is_what_a_process_may_have(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=40 * GIB))
    root, own = groups(tmp_path, "0::/pod/container/step")
    write(root / "pod", memory__max=str(16 * GIB), memory__current=str(14 * GIB))
    write(root / "pod" / "container", memory__max=str(8 * GIB), memory__current=str(GIB))
    write(root / "pod" / "container" / "step", memory__max="max", memory__current=str(GIB))
    assert machine.usable_memory(root, own) == 8 * GIB
    assert machine.memory_limit(64 * GIB, root, own) == (16 * GIB, 2 * GIB)  # the pod's is met first


def test_a_limit_above_the_machines_memory_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=4 * GIB, available=GIB))
    root, own = groups(tmp_path, "0::/job")
    write(root / "job", memory__max=str(8 * GIB), memory__current="1")
    assert machine.usable_memory(root, own) == 4 * GIB


def test_plan_and_doctor_ask_the_same(monkeypatch, tmp_path):
    root, own = groups(tmp_path, "0::/job/step")
    write(root / "job", memory__max=str(GIB // 4), memory__current="1")
    write(root / "job" / "step", memory__max="max", memory__current="1")
    found = machine._groups
    monkeypatch.setattr(machine, "_groups", lambda kind, *_: found(kind, root, own))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert detect().memory == GIB // 4
    assert machine.free_memory()[2] == GIB // 4
