"""The last questions (placement, folder, confirmation), and all questions in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from saekit.errors import UserError
from saekit.placement.choose import kind_of
from saekit.runs.folder import check_run_folder
from saekit.training.plan import default_run_name
from saekit.wizard.draft import Draft, known, launch_text, run_text, secrets_in, template_for
from saekit.wizard.inputs import ARGUMENTS, COLUMN, DATASET, MACHINE, MODEL, SPLIT
from saekit.wizard.places import KIND, LAYERS
from saekit.wizard.sizes import BATCH, CONTEXT, DICTIONARY, TOKENS, K
from saekit.wizard.walk import QUOTE, Question


def _explain_placement(draft: Draft) -> str:
    plan = known(draft.plan)
    best = plan.recommended
    said = []
    for each in plan.choices:
        mark = " (recommended)" if each == best else "" if each.fits else " (does not fit)"
        said.append(f"{each.placement}{mark}: {kind_of(each.placement).title}")
    return "; ".join(said)


def _placement(draft: Draft) -> str:
    """Return the requested placement, or the previous one if it still fits, or the plan's recommendation."""
    plan = known(draft.plan)
    fitting = {each.placement for each in plan.choices if each.fits}
    earlier = draft.earlier.placement if draft.earlier.placement in fitting else ""
    best = plan.recommended or min(plan.choices, key=lambda each: each.total)
    return draft.placement or earlier or best.placement


def _take_placement(draft: Draft, text: str) -> Draft:
    known(draft.plan).choice(text)
    return replace(draft, placement=text)


def _tell_placement(draft: Draft) -> Sequence[str]:
    chosen = known(draft.plan).choice(draft.placement)
    return () if chosen.fits else ("The plan says that it does not fit.",)


def _run(draft: Draft) -> str:
    """Return the run's folder: a new one, unless the command line names the run, --overwrite or --resume."""
    cfg = draft.config()
    name = cfg.train.run_name or default_run_name(cfg.model.model, cfg)
    if "run_name" in draft.typed or cfg.train.overwrite or cfg.train.resume:
        return str(cfg.train.save_dir / name)
    folder, number = cfg.train.save_dir / name, 2
    while folder.exists():
        folder, number = folder.with_name(f"{name}-{number}"), number + 1
    return str(folder)


def _take_run(draft: Draft, text: str) -> Draft:
    folder = Path(text).expanduser()
    draft = draft.setting(save_dir=str(folder.parent), run_name=folder.name)
    check_run_folder(draft.config().train, folder)
    return draft


def _tell_run(draft: Draft) -> Sequence[str]:
    targets, count = draft.targets, known(draft.machine).count
    told = [f"{targets.run} ({_replaces(targets.run)})", *(f"{QUOTE}{line}" for line in _run_text(draft).splitlines())]
    if count > 1:
        told.append(f"{targets.launch} ({_replaces(targets.launch)}): {draft.placement} on {count} processes")
    for name in secrets_in(draft.values):
        told.append(f"{name} is not written: give --{name.replace('_', '-')} again, or set HF_TOKEN")
    return told


def _replaces(path: Path) -> str:
    if not path.is_file():
        return "new"
    comments = "#" in path.read_text(encoding="utf-8", errors="replace")
    return "replaces the existing file" + (" and removes its comments" if comments else "")


def _run_text(draft: Draft) -> str:
    return run_text(draft.values, draft.config())


def files_of(draft: Draft) -> Mapping[Path, str]:
    """Return the files to write: `run.yaml`, and for several processes a launch file."""
    files = {draft.targets.run: _run_text(draft)}
    machine = known(draft.machine)
    if machine.count > 1:
        template = template_for(draft.targets, draft.placement, on_gpu=machine.on_gpu)
        files[draft.targets.launch] = launch_text(template, machine.count)
    return files


def start_command(draft: Draft) -> list[str]:
    """Return the words of the command that starts the run from these files."""
    targets = draft.targets
    launch = ["--launch", str(targets.launch)] if known(draft.machine).count > 1 else []
    return ["saekit", "train", "--config", str(targets.run), *launch]


def _take_confirmation(draft: Draft, text: str) -> Draft:
    if text.lower() in ("n", "no"):
        raise KeyboardInterrupt
    if text.lower() not in ("y", "yes"):
        raise UserError(f"{text!r} is not an answer: yes writes the files, no leaves everything as it was")
    return draft


PLACEMENT = Question(
    "placement",
    "Placement",
    _explain_placement,
    _placement,
    _take_placement,
    _tell_placement,
    needed=lambda draft: known(draft.machine).count > 1,
    choices=lambda draft: [each.placement for each in known(draft.plan).choices],
)
RUN = Question(
    "run",
    "Save in",
    lambda draft: "Folder of the run, for checkpoints, metrics and its configuration.",
    _run,
    _take_run,
    _tell_run,
    is_path=True,
)
CONFIRM = Question(
    "confirm",
    "Write it",
    lambda draft: "Nothing has been written so far.",
    lambda draft: "yes",
    _take_confirmation,
    choices=lambda draft: ("yes", "no"),
)


QUESTIONS = (
    MACHINE,
    MODEL,
    DATASET,
    ARGUMENTS,
    SPLIT,
    COLUMN,
    KIND,
    LAYERS,
    DICTIONARY,
    K,
    CONTEXT,
    TOKENS,
    BATCH,
    PLACEMENT,
    RUN,
    CONFIRM,
)
