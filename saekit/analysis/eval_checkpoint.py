"""Load a checkpoint with its model and data, and evaluate it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from saekit._version import __version__
from saekit.activations import (
    WithHead,
    agreed_type,
    choose_attention,
    excluded_tokens,
    find_tokenizer,
    load_with_head,
    model_shape,
    no_bars,
    resolve_ctx_len,
    vocabulary_of,
)
from saekit.activations.same_tokens import check_same_tokens
from saekit.analysis.coder_files import check_models
from saekit.analysis.defaults import DEFAULT_TOKENS
from saekit.analysis.evaluate import Progress, evaluate
from saekit.analysis.results import Evaluation
from saekit.analysis.subject import NO_HEAD, Subject, choose_objective, of_kinds
from saekit.config import DataConfig, RunConfig
from saekit.config.flat import read_yaml
from saekit.data import Sequences, check_tokens, load_sequences, numbers_read
from saekit.data.held_out import shuffled, unread
from saekit.errors import UserError
from saekit.placement import Placement, connect
from saekit.placement.failure import one_error
from saekit.runs.files import write_at_once
from saekit.runs.layout import CONFIG_FILE, EVAL_FILE
from saekit.runs.locate import check_files, locate
from saekit.runs.opening import open_sae

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_CHECKPOINTS = "sparsify"
"""The format of SAEs in checkpoints."""
HELD_OUT = "documents of the run's data set that it was not trained on"
OTHER_SPLIT = "another split of the run's data set, without documents that the run was trained on"
OTHER = "another data set than the run's"
SEEN = "the run's data set, what it was trained on included"


@dataclass(frozen=True)
class EvalOptions:
    """The options of an evaluation. None means the run's own value."""

    dataset: str | None = None
    split: str | None = None
    model: str | None = None
    other_model: str | None = None
    """The second model, for crosscoders of two models."""
    max_tokens: int | None = None
    """The number of tokens to evaluate on. None means `DEFAULT_TOKENS`."""
    batch_size: int = 8
    """Sequences per forward pass of the language model, on each rank."""
    include_training_data: bool = False
    verify: bool = True
    """Whether to compare the checkpoint's files with its checksums."""


class Evaluated(NamedTuple):
    """The outcome of an evaluation."""

    results: Evaluation
    record: dict[str, Any]
    """The content of `eval.json`: the results as plain values, with the names of the models and data."""


@contextmanager
def joined(quiet: bool) -> Iterator[Placement]:
    """Connect the ranks of an evaluation, and disconnect them afterwards. An error on one rank ends all. Collective.

    Args:
        quiet: Whether to disable the libraries' progress bars on rank 0 too.
    """
    placement = connect()
    if quiet or placement.rank > 0:
        no_bars()
    with one_error(placement, lambda: "start the evaluation again"):
        yield placement
        placement.close()


@dataclass(frozen=True)
class Prepared:
    """A loaded checkpoint with everything that its evaluation needs."""

    folder: Path
    """The folder for `eval.json`: the checkpoint's, or that of a single SAE."""
    cfg: RunConfig
    """The run's configuration, changed by the evaluation's options."""
    origin: str
    """The kind of data: `HELD_OUT`, `OTHER_SPLIT`, `OTHER` or `SEEN`."""
    tokenizer: PreTrainedTokenizerBase | None
    """The model's tokenizer. None if it has none."""
    subject: Subject


def prepare(
    path: Path, options: EvalOptions, placement: Placement, status: Callable[[str], None] = lambda text: None
) -> Prepared:
    """Load a run's latest checkpoint, a checkpoint, or one SAE, with its language model and data. Collective.

    The ranks share the sequences. Each rank holds all SAEs.

    Args:
        path: The folder.
        options: The options of the evaluation.
        placement: The ranks.
        status: Called with a line of text on progress.

    Raises:
        UserError: If something is missing or does not fit, or if no held-out data is left.
    """
    location = locate(path, verify=options.verify)
    if options.verify:
        check_files(location, location.saes)
    run = _config(location.checkpoint, options)
    cfg = run.cfg
    models = [each for each in (cfg.model, cfg.other_model) if each is not None]
    check_models(location.saes, location.checkpoint, len(models))
    shapes = []
    for each in models:
        status(f"Reading the configuration of {each.model}")
        shapes.append(model_shape(each))
    ctx_len = resolve_ctx_len(cfg.train.ctx_len, *(each.max_ctx_len for each in shapes))
    tokenizers = [find_tokenizer(each) for each in models]
    tokenizer, vocabularies = tokenizers[0], [vocabulary_of(each.config) for each in shapes]
    if len(models) == 2:
        check_same_tokens((tokenizer, tokenizers[1]), (vocabularies[0], vocabularies[1]), models[1].model, status)
    status(f"Reading and tokenizing {cfg.data.dataset}")
    with placement.in_turn():  # the first rank tokenizes, and the others read its result from the cache
        data, origin = _data(run, _read_options(location.manifest), tokenizer, ctx_len, options)
        data = shuffled(data, DEFAULT_TOKENS if options.max_tokens is None else options.max_tokens)
        check_tokens(data, min(vocabularies), what="the data to evaluate on")

    loaded: list[WithHead] = []
    excluded_ids: set[int] = set()
    for each, shape, own in zip(models, shapes, tokenizers, strict=True):
        status(f"Loading {each.model}")
        agreed = agreed_type(each, placement.device, placement.gather)
        loaded.append(load_with_head(agreed, shape, placement.device))
        choose_attention(loaded[-1].model, ctx_len)
        excluded_ids.update(excluded_tokens(cfg.train, loaded[-1].model, own))
    model, predicts = loaded[0]
    excluded = torch.tensor(sorted(excluded_ids), dtype=torch.int64)
    mask_id = None if tokenizer is None else tokenizer.mask_token_id
    objective, name = choose_objective(predicts, mask_id, excluded, NO_HEAD)
    saes = {
        name: open_sae(folder, placement.device, format=IN_CHECKPOINTS, verify=options.verify).eval()
        for name, folder in location.saes.items()
    }
    subject = Subject(
        model=model,
        saes=saes,
        data=data,
        excluded=excluded,
        objective=objective,
        objective_name=name,
        batch_size=options.batch_size,
        rank=placement.rank,
        world_size=placement.world_size,
        total=placement.sum,
        other=loaded[1].model if len(loaded) == 2 else None,
        other_name=models[-1].model if len(loaded) == 2 else None,
    )
    return Prepared(location.checkpoint if location.kind != "sae" else path, cfg, origin, tokenizer, subject)


def evaluate_checkpoint(
    path: Path,
    options: EvalOptions,
    placement: Placement,
    status: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, of: None,
) -> Evaluated:
    """Load a checkpoint with `prepare`, evaluate it, and write `eval.json` into its folder. Collective.

    Args:
        path: The folder. See `prepare`.
        options: The options of the evaluation.
        placement: The ranks.
        status: Called with a line of text on progress.
        progress: Called with the number of passes over a batch that are done, and their total.

    Raises:
        UserError: See `prepare`. Also if the file cannot be written.
    """
    prepared = prepare(path, options, placement, status)
    return evaluate_prepared(prepared, status, progress)


def evaluate_prepared(
    prepared: Prepared,
    status: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, of: None,
) -> Evaluated:
    """Evaluate a loaded checkpoint, and write `eval.json`: the second half of `evaluate_checkpoint`. Collective."""
    subject = prepared.subject
    what = of_kinds([site.kind for site in subject.sites.values()])
    status(f"Evaluating {what} on {len(subject.data):,} sequences of {subject.data.ctx_len:,} tokens")
    results = evaluate(subject, progress)
    record = _record(results, prepared.cfg, prepared.origin)
    if subject.rank == 0:
        write_evaluation(record, prepared.folder / EVAL_FILE)
    return Evaluated(results, record)


def write_evaluation(record: dict[str, Any], file: Path) -> None:
    """Write `eval.json` atomically.

    Raises:
        UserError: If the folder is not writable.
    """
    try:
        write_at_once(file, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})") from None


def _record(found: Evaluation, cfg: RunConfig, origin: str) -> dict[str, Any]:
    second = {} if cfg.other_model is None else {"other_model": cfg.other_model.model}
    about = {
        "saekit_version": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": cfg.model.model,
        **second,
        "dataset": cfg.data.dataset,
        "split": cfg.data.split,
        "data": origin,
        "held_out": {HELD_OUT: True, OTHER_SPLIT: True, SEEN: False}.get(origin),
    }
    return {**about, **found.to_json(), "warnings": found.warnings()}


class _Run(NamedTuple):
    """The models and data of an evaluation."""

    cfg: RunConfig
    """The run's configuration, changed by the evaluation's options."""
    trained: DataConfig | None
    """The data set that the run trained on. None if it is unknown, or if another data set is evaluated."""


def _config(checkpoint: Path, options: EvalOptions) -> _Run:
    file = checkpoint.parent / CONFIG_FILE
    values = read_yaml(file) if file.is_file() else {}
    asked = {name: value for name in ("model", "dataset", "split") if (value := getattr(options, name)) is not None}
    if options.other_model is not None:
        asked["crosscode_models"] = options.other_model
        values.pop("crosscode_revision", None)  # belongs to the model that it replaces
    for name in ("model", "dataset"):
        if name not in values and name not in asked:
            given = "DATASET" if name == "dataset" else "--model"
            raise UserError(f"{checkpoint} does not say which {name} it was trained with: pass it as {given}")
    if "dataset" in asked and asked["dataset"] != values.get("dataset"):
        # Options for reading the run's data set do not apply to another one, except the type of token ids in .bin
        # files.
        own = {"split", "data_args", "max_examples"}
        if all(str(each).endswith(".bin") for each in (asked["dataset"], values.get("dataset"))):
            own.remove("data_args")
        values = {name: value for name, value in values.items() if name not in own}
        return _Run(RunConfig.from_flat({**values, **asked}), None)
    # Options replace only missing values here: the run's own data is needed, and its model may have moved.
    return _Run(RunConfig.from_flat({**values, **asked}), RunConfig.from_flat({**asked, **values}).data)


def _read_options(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says in place of the run's options about what was read (`Source.read_options`)."""
    data = manifest.get("data")
    return dict(data.get("read_options", {})) if isinstance(data, Mapping) else {}


def _data(
    run: _Run, read_options: Mapping[str, Any], tokenizer: Any, ctx_len: int, options: EvalOptions
) -> tuple[Sequences, str]:
    """Return the sequences to evaluate on, and their kind (`Prepared.origin`)."""
    cfg, trained = run
    token = cfg.model.token
    if trained is None or options.include_training_data:
        return load_sequences(cfg.data, tokenizer, ctx_len, token), OTHER if trained is None else SEEN
    # The sequences of the whole run, not only up to this checkpoint, so that all its checkpoints get the same tokens.
    seen = numbers_read(replace(cfg.train, **read_options), load_sequences(trained, tokenizer, ctx_len, token))
    origin = HELD_OUT if cfg.data.split == trained.split else OTHER_SPLIT
    return unread(cfg.data, trained, tokenizer, ctx_len, seen, token), origin
