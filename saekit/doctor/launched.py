"""Checks of ranks that a launcher has started. Every rank runs them, and rank 0 reports."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from saekit.doctor.checks import datasets_folder
from saekit.doctor.findings import COLLECTIVES, NODES, RANKS, Finding, describe_error
from saekit.doctor.watch import LEAVING, Place, Watch
from saekit.units import plural, size

if TYPE_CHECKING:
    from saekit.placement.trial import About, Seen

LATE_CLOCK = 1.0
"""Seconds by which clocks may differ without a note."""
SLOW = 100e6
"""Bytes per second below which ranks would mostly wait for each other."""
JOINING = "join"
MEETING = ("start", JOINING, "introductions")
FOLDERS = ("save-dir", "data sets")
INTERFACE = "name the network's interface (see ip addr): export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"

Result = TypeVar("Result")


class Diagnosis:
    """The checks of one rank, in the same order on all ranks.

    Args:
        save_dir: Where runs would be saved.
        limit_s: Seconds that all checks together may take.
        tell: Receives the findings on rank 0. The other ranks do not call it.
    """

    def __init__(self, save_dir: Path, limit_s: float, tell: Callable[[list[Finding]], None]) -> None:
        self._save_dir, self._limit_s, self._tell = save_dir, limit_s, tell
        self._rank, self._ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._found: list[Finding] = []
        self._on_gpu = False
        self._watch = Watch(self._rank, self._ranks, limit_s, self._ended)

    def run(self) -> bool:
        """Run all checks. Ends the process if a check fails on any rank or the limit has passed.

        Returns:
            False on rank 0 if there is a problem. Always True on the other ranks: if one failed, the launcher could
            stop rank 0 before it has reported.
        """
        from saekit.placement import connect, trial

        self._watch.use(self._stage(JOINING, trial.agent_store))
        placement = self._stage(JOINING, connect)
        self._watch.use(trial.store_of(placement))
        about = self._stage("introductions", lambda: trial.introduce(placement))
        self._on_gpu = placement.device.type == "cuda"
        self._found += [*joined(about, placement.name), *devices(about), *backends(about), *cores(about)]
        for name, kind in trial.collectives(placement).items():
            said = self._stage(name, kind)
            self._found += collective(name, self._stage(name, partial(placement.gather, said)))
        for name, speed in self._stage("speed", lambda: trial.speeds(placement)).items():
            self._found += fast(name, speed, self._hint(name))
        for name, folder in zip(FOLDERS, (self._save_dir, datasets_folder()), strict=True):
            seen = self._stage(name, partial(trial.look_at, folder, placement))
            self._found += shared(name, about, seen)
        self._found += clocks(about, self._stage("clocks", lambda: trial.clocks(placement)))
        self._found += versions(about)
        self._stage(LEAVING, placement.close)
        self._watch.done()
        if self._rank == 0:
            self._tell(self._found)
        return self._rank > 0 or not any(finding.state == "problem" for finding in self._found)

    def _stage(self, name: str, work: Callable[[], Result]) -> Result:
        try:
            self._watch.at(name)
            return work()
        except Exception as error:  # a broken cluster can raise anything, and that is the finding
            self._watch.fail(describe_error(error))
            raise

    def _ended(self, late: bool, places: list[Place | None]) -> None:
        limit = f"did not finish within {self._limit_s:g} s" if late else "failed"
        stage = places[self._rank].stage if places[self._rank] else JOINING  # type: ignore[union-attr]
        area = RANKS if stage in MEETING else NODES if stage in (*FOLDERS, "clocks") else COLLECTIVES
        errors = [f"rank {rank}: {place.error}" for rank, place in enumerate(places) if place and place.error]
        silent = [] if late else ["a rank has ended without an error message"]
        found = "; ".join([limit, *(errors or [*silent, *waiting(places)])])
        remedy = f"if the error does not help: {self._hint(stage)}" if errors else self._hint(stage)
        self._tell([*self._found, Finding(area, stage, "problem", found, remedy)])

    def _hint(self, stage: str) -> str:
        """Return a remedy for ranks that hang or are slow in a stage."""
        if stage in MEETING:
            where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            return f"start all ranks, check that each machine can reach {where} (firewall), and {INTERFACE}"
        if stage in FOLDERS:
            return "check on each machine that the disk responds: ls the folder"
        if self._on_gpu:
            return (
                f"{INTERFACE}; NCCL_DEBUG=INFO shows what NCCL uses; if the link between GPUs or InfiniBand is broken, "
                "try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1"
            )
        return INTERFACE


def waiting(places: Sequence[Place | None]) -> Iterator[str]:
    """Say at which stage each rank is."""
    at: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        at.setdefault("not connected" if place is None else f"at {place.stage}", []).append(rank)
    for where, ranks in at.items():
        yield f"{named(ranks)} {'is' if len(ranks) == 1 else 'are'} {where}"


def named(ranks: Sequence[int]) -> str:
    """Return `rank 3`, or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    shown = ", ".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in spans)
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def by(about: Sequence[About], key: Callable[[About], str]) -> dict[str, list[int]]:
    """Group ranks by a property: return the ranks by its value."""
    groups: dict[str, list[int]] = {}
    for each in about:
        groups.setdefault(key(each), []).append(each.rank)
    return groups


def differing(groups: Mapping[str, Sequence[int]]) -> str:
    """List the values of a property, each with its ranks."""
    return "; ".join(f"{value}: {named(ranks)}" for value, ranks in groups.items())


def joined(about: Sequence[About], placement: str) -> Iterator[Finding]:
    """Report how many ranks have met, and under which placement."""
    hosts = by(about, lambda each: each.host)
    found = f"{plural(len(about), 'rank')} on {plural(len(hosts), 'machine')}, --placement {placement}"
    yield Finding(RANKS, JOINING, "ok", found)


def devices(about: Sequence[About]) -> Iterator[Finding]:
    """Check that each rank has its own device, and that all are of one kind."""
    kinds = by(about, lambda each: each.device.split()[0])
    models = by(about, lambda each: each.device)
    twice = {
        f"{host}'s GPU {gpu}": ranks
        for host in by(about, lambda each: each.host)
        for gpu, ranks in by([each for each in about if each.host == host], lambda each: str(each.device_id)).items()
        if gpu != "None" and len(ranks) > 1
    }
    if len(kinds) > 1:
        remedy = "show GPUs to all ranks (CUDA_VISIBLE_DEVICES), or use a launch file whose name ends in cpu"
        yield Finding(RANKS, "devices", "problem", differing(models), remedy)
    elif twice:
        remedy = "use one rank per GPU: lower --num-processes, or request as many GPUs as ranks"
        yield Finding(RANKS, "devices", "problem", f"shared: {differing(twice)}", remedy)
    elif len(models) > 1:
        remedy = (
            "nothing, or use GPUs of one kind: the slowest sets the pace, and ddp cannot save if they round differently"
        )
        yield Finding(RANKS, "devices", "note", differing(models), remedy)
    else:
        yield Finding(RANKS, "devices", "ok", differing(models))


def backends(about: Sequence[About]) -> Iterator[Finding]:
    """Check the backends: NCCL between GPUs, gloo between CPUs and for small values."""
    spoken = by(about, lambda each: f"{each.backend} for tensors, {each.control} for small values")
    wrong = [each.rank for each in about if (each.backend == "nccl") != each.device.startswith("cuda")]
    if wrong or len(spoken) > 1:
        remedy = "use a launch file from accelerate_configs/: these leave the choice to saekit"
        yield Finding(RANKS, "backends", "problem", differing(spoken), remedy)
    else:
        yield Finding(RANKS, "backends", "ok", next(iter(spoken)))


def cores(about: Sequence[About]) -> Iterator[Finding]:
    """Check that each machine has enough cores for the threads of its ranks."""
    for host, ranks in by(about, lambda each: each.host).items():
        here = [about[rank] for rank in ranks]
        there = len(frozenset().union(*(each.cores for each in here)))
        threads = sum(each.threads for each in here)
        found = f"{host}: {plural(len(here), 'rank')} with {plural(threads, 'thread')} on {plural(there, 'core')}"
        if there and there < len(here):
            remedy = "with SLURM: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK (srun does not inherit it since 22.05)"
            yield Finding(RANKS, "cores", "problem", found, remedy)
        elif there and threads > there:
            yield Finding(RANKS, "cores", "note", found, f"export OMP_NUM_THREADS={max(1, there // len(here))}")
        else:
            yield Finding(RANKS, "cores", "ok", found)


def collective(name: str, wrong: Sequence[str | None]) -> Iterator[Finding]:
    """Check that a collective gave every rank the right result."""
    said = [f"rank {rank}: {each}" for rank, each in enumerate(wrong) if each is not None]
    if said:
        remedy = "do not train here: try other versions of torch, the driver or NCCL"
        yield Finding(COLLECTIVES, name, "problem", f"wrong result: {'; '.join(said[:3])}", remedy)
    else:
        yield Finding(COLLECTIVES, name, "ok", "correct on every rank")


def fast(name: str, speed: float, hint: str) -> Iterator[Finding]:
    """Report the speed of a collective."""
    found = f"each rank sends {size(speed)}/s"
    if speed < SLOW:
        yield Finding(COLLECTIVES, f"{name} speed", "note", f"{found}, which is slow", hint)
    else:
        yield Finding(COLLECTIVES, f"{name} speed", "ok", found)


def shared(name: str, about: Sequence[About], seen: Sequence[Seen]) -> Iterator[Finding]:
    """Check that all ranks see the same folder and can write to it."""
    apart = [rank for rank, each in enumerate(seen) if not each.shared]
    refused = {f"{each.path} ({each.refused})": [rank] for rank, each in enumerate(seen) if each.refused}
    if refused:
        yield Finding(NODES, name, "problem", f"cannot be written: {differing(refused)}", "use another folder")
    elif apart:
        hosts = ", ".join(by([about[rank] for rank in apart], lambda each: each.host))
        found = f"{named(apart)} ({hosts}) {'does' if len(apart) == 1 else 'do'} not see rank 0's {seen[0].path}"
        if name == "save-dir":
            remedy = "use --save-dir FOLDER, an absolute path on a disk that all machines see"
            yield Finding(NODES, name, "problem", found, remedy)
        else:
            remedy = "nothing, or export HF_HOME=FOLDER on a shared disk, so that only one machine tokenizes"
            yield Finding(NODES, name, "note", found, remedy)
    else:
        yield Finding(NODES, name, "ok", f"{seen[0].path}: shared and writable on every rank")


def clocks(about: Sequence[About], ahead: Sequence[float]) -> Iterator[Finding]:
    """Check that the machines' clocks agree, since they order files and logs."""
    spread = max(ahead) - min(ahead)
    if spread > LATE_CLOCK:
        worst = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
        found = f"{about[worst].host} (rank {worst}) differs from rank 0 by {ahead[worst]:+.1f} s"
        yield Finding(NODES, "clocks", "note", found, "synchronize the clocks: timedatectl set-ntp true")
    else:
        yield Finding(NODES, "clocks", "ok", f"within {spread:.2f} s")


def _version(name: str, of: About) -> str:
    return of.versions.get(name, "none")


def versions(about: Sequence[About]) -> Iterator[Finding]:
    """Check that all ranks have the same versions of libraries."""
    names = list(dict.fromkeys(name for each in about for name in each.versions))
    differ = False
    for name in names:
        groups = by(about, partial(_version, name))
        if len(groups) > 1:
            differ = True
            remedy = "use one environment on all machines, on a shared disk or in a container image"
            yield Finding(NODES, name, "problem", differing(groups), remedy)
    if not differ:
        shown = ", ".join(f"{name} {about[0].versions[name]}" for name in names)
        yield Finding(NODES, "versions", "ok", f"the same on every rank: {shown}")
