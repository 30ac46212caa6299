"""The functions of the API: train, evaluate and load SAEs from Python, as the command line does.

Each function imports torch and the other heavy libraries itself, so that `import saekit` stays fast.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saekit.analysis.defaults import DEFAULT_TOKENS
from saekit.config import RunConfig
from saekit.config.flat import option_names, unknown_options
from saekit.config.options import options_of
from saekit.config.run import PARTS
from saekit.errors import UserError
from saekit.runs.folder import all_options

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from datasets import Dataset, DatasetDict, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from saekit.analysis.results import Evaluation
    from saekit.report import Reporter
    from saekit.sae import Sae

    Data: TypeAlias = "str | Path | Dataset | DatasetDict | IterableDataset | Sequence[str]"

IN_MEMORY = "data in memory"
"""Stands for the name of a data set in memory. No data set on the hub can have this name."""
EVAL_IN_MEMORY = "evaluation data in memory"
OF_LOADING = ("revision", "dtype", "load_in_8bit", "shard_lm")
"""Options that say how to load the language model. They do not apply to a model that is already loaded."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options(function: Function) -> Function:
    """Replace `**options` in a function's signature and docstring by the options of the configuration."""
    own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
    names = {parameter.name for parameter in own}
    options = [option for part in PARTS for option in options_of(part) if option.name not in names]
    parameters = own + [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in options
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=Path)  # type: ignore[attr-defined]
    lines = [f"    {each.name}: {each.help}" + (f" In {each.unit}." if each.unit else "") for each in options]
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n" + "\n".join(lines) + "\n"
    return function


@_with_options
def train(
    model: str | Path | PreTrainedModel | None = None,
    dataset: Data | None = None,
    *,
    config: str | Path | None = None,
    eval_dataset: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    other_model: PreTrainedModel | None = None,
    other_tokenizer: PreTrainedTokenizerBase | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Path:
    """Train one SAE per layer of a language model, as `saekit train` does.

    A plain script trains in one process. In a script started by `accelerate launch` or `torchrun`, every rank makes the
    same call, and the ranks train together under the placement that the launch file or `placement` names.

    Args:
        model: The language model: a hub id, a local folder, or a loaded model. A loaded model is not modified. It stays
            on its device; under a launcher it moves to the rank's device. Optional if `config` names it, and with
            `resume` or `activations`.
        dataset: The text: a hub id, a local folder or file, or data in memory. Data in memory is a list of texts, or a
            `datasets.Dataset`, `IterableDataset` or `DatasetDict` with a column of text or a column `input_ids`.
            Optional like `model`.
        config: A YAML file of options, as for `saekit train --config`. Arguments take precedence over it.
        eval_dataset: The data that `eval_every` evaluates on, in the same forms as `dataset`. By default, documents of
            `dataset` that the run does not train on. Required if `dataset` is data in memory.
        tokenizer: The tokenizer of a loaded model. By default, that of the folder or hub id it was loaded from.
        other_model: A loaded second model for crosscoders of two models, in place of the name in `crosscode_models`. It
            is not modified, and moves to the device of `model`.
        other_tokenizer: The tokenizer of `other_model`. Both tokenizers must give the same token ids.
        reporter: Shows the progress. By default the live view, or plain lines without a terminal.
        options: The options of `saekit train`, with underscores in their names (`batch_size=8`, `ctx_len=1024`,
            `layers="0-10:2"` or `layers=[0, 2]`). None means the default.

    Returns:
        The folder of the last checkpoint, on every rank. Pass it to `load_many` or `evaluate`.

    Raises:
        UserError: If an option does not exist or has an invalid value, if a file, model or data set cannot be read, or
            if NaN or Inf ends the run (`SaeTrainer.fit`).
        SaveError: If a checkpoint cannot be written.
        Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, once the step is finished and its checkpoint is written.
    """
    loaded, model_name = _loaded_model(model)
    if other_model is not None:
        if "crosscode_models" in options:
            raise UserError("crosscode_models and other_model both name the second model: give only one of them")
        other_model, options["crosscode_models"] = _loaded_model(other_model)
        if other_model is None:
            raise UserError("other_model is a name: pass a loaded model, or pass the name as crosscode_models")
    rows, dataset_name = _rows(dataset, IN_MEMORY)
    eval_rows, eval_name = _rows(eval_dataset, EVAL_IN_MEMORY)
    given = {"model": model_name, "dataset": dataset_name, "eval_dataset": eval_name, **options}
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := unknown_options(given, option_names(*PARTS)):
        raise UserError("; ".join(unknown))
    values = all_options(given, None if config is None else Path(config))
    if "activations" in values:
        from saekit.training.cached import completed

        values = completed(values)
    for name in ("model", "dataset"):
        if name not in values:
            raise UserError(f"{name} is missing: pass it, or a config that names it")
    cfg = RunConfig.from_flat(values)
    by_name = loaded is None or (cfg.train.crosscode_models is not None and other_model is None)
    if not by_name and (useless := [name for name in OF_LOADING if name in given]):
        raise UserError(
            f"{useless[0]}={given[useless[0]]!r} is for loading the model, but the model is loaded: leave it out"
        )
    if (loaded is None and tokenizer is not None) or (other_model is None and other_tokenizer is not None):
        raise UserError("a tokenizer needs a loaded model: leave the tokenizer out, or pass the model loaded as well")
    if rows is not None and cfg.train.eval_every is not None and cfg.data.eval_dataset in (None, cfg.data.dataset):
        raise UserError("eval_every needs an eval_dataset: saekit holds out no part of data in memory")

    from saekit.training.early import InMemory
    from saekit.training.launch import train_from_config

    return train_from_config(cfg, reporter, InMemory(loaded, tokenizer, rows, eval_rows, other_model, other_tokenizer))


def evaluate(
    checkpoint: str | Path,
    dataset: str | Path | None = None,
    *,
    split: str | None = None,
    model: str | Path | None = None,
    other_model: str | Path | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    batch_size: int = 8,
    include_training_data: bool = False,
    verify: bool = True,
) -> Evaluation:
    """Evaluate SAEs as `saekit eval` does: reconstruction error, and the language model's loss with it spliced in.

    Also writes the results to `eval.json` in the checkpoint. Ranks started by a launcher share the work.

    Args:
        checkpoint: The folder of a run (its latest checkpoint), of a checkpoint, or of one SAE.
        dataset: A hub id, a local folder or a file. By default, documents of the run's data set that it did not train
            on.
        split: The split of the data set. By default the run's.
        model: The language model's hub id or folder. By default the model that the run was trained on.
        other_model: The second model's hub id or folder, for crosscoders of two models.
        max_tokens: Number of tokens to evaluate on.
        batch_size: Sequences per forward pass of the language model, on each rank.
        include_training_data: Whether to also evaluate on documents that the run was trained on.
        verify: Whether to compare the SAEs' files with the checksums of their checkpoint.

    Returns:
        The results of every layer, each number with its confidence interval. `to_json()` gives plain values.

    Raises:
        UserError: If something is missing, damaged or unreadable, or if no held-out data is left.

    Warns:
        UserWarning: If results look wrong, as for SAEs of another model or hookpoint, or come from few sequences.
    """
    for name, value, optional in (
        ("checkpoint", checkpoint, False),
        ("dataset", dataset, True),
        ("model", model, True),
        ("other_model", other_model, True),
    ):
        if not isinstance(value, (str, Path)) and not (optional and value is None):
            raise UserError(f"{name} is a {type(value).__name__}: pass a path or a name, as for saekit eval")
    for name, number in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise UserError(f"{name} is {number}: expected at least 1")

    from saekit.analysis.eval_checkpoint import EvalOptions, evaluate_checkpoint, joined

    dataset, model, other_model = (None if each is None else str(each) for each in (dataset, model, other_model))
    options = EvalOptions(dataset, split, model, other_model, max_tokens, batch_size, include_training_data, verify)
    with joined(quiet=not sys.stderr.isatty()) as placement:
        results = evaluate_checkpoint(Path(checkpoint), options, placement).results
    for text in results.warnings() if placement.rank == 0 else ():
        warnings.warn(text, UserWarning, stacklevel=2)
    return results


def load(
    path: str | Path,
    hookpoint: str | None = None,
    device: torch.device | str = "cpu",
    *,
    format: str | None = None,
    verify: bool = True,
    **hub_options: Any,
) -> Sae:
    """Load one SAE, in any format: saekit's own (which is sparsify's), SAELens', or a plug-in's.

    The files in the folder tell the format. Files in a checkpoint are compared with the checkpoint's checksums.

    Args:
        path: The folder of an SAE, a run (its latest checkpoint) or a checkpoint, or a hub id such as
            `EleutherAI/sae-llama-3-8b-32x`.
        hookpoint: Which SAE to load from a folder or repository with several, such as `layers.3`.
        device: Where the parameters go.
        format: The name of the format, for folders that several formats recognize.
        verify: Whether to compare the files with the checkpoint's checksums.
        hub_options: Passed to `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).

    Raises:
        UserError: If there is no such SAE, if there are several and `hookpoint` is not given, if several formats
            recognize the folder, or if a file is damaged, was changed, or describes an SAE that saekit cannot compute.
    """
    from saekit.runs.named import Opening

    return Opening(path, device, format, verify, hub_options).one(hookpoint)


def load_many(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    format: str | None = None,
    verify: bool = True,
    **hub_options: Any,
) -> dict[str, Sae]:
    """Load all SAEs of a run (its latest checkpoint), of a folder, or of a repository on the hub.

    Args:
        path: A folder or a hub id.
        device: Where the parameters go.
        format: The name of the format, for folders that several formats recognize.
        verify: See `load`.
        hub_options: Passed to `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).

    Returns:
        The SAEs by hookpoint, in natural order: `layers.2` comes before `layers.10`.

    Raises:
        UserError: See `load`.
    """
    from saekit.runs.named import Opening

    return Opening(path, device, format, verify, hub_options).all()


def save(sae: Sae, folder: str | Path, format: str = "sparsify", metadata: Mapping[str, Any] | None = None) -> None:
    """Write one SAE into a folder.

    Args:
        sae: The SAE.
        folder: Where the files go. Created if it does not exist.
        format: `sparsify`, which is saekit's own, `saelens`, or the name of a plug-in's format.
        metadata: Further information for readers, such as the language model's name, if the format has a place for it.
            `saekit.save_as_saelens` says what SAELens expects.

    Raises:
        UserError: If there is no such format, if the format cannot express this SAE (nothing is written then), or if
            the files cannot be written.
    """
    from saekit.runs.opening import user_errors
    from saekit.sae import Sae
    from saekit.sae.formats.base import formats

    if not isinstance(sae, Sae):
        raise UserError(f"sae is a {type(sae).__name__}: pass an Sae, such as saekit.load returns")
    with user_errors():
        (chosen,) = formats(format)
        chosen.write(sae, Path(folder).expanduser(), metadata)


def _loaded_model(model: str | Path | PreTrainedModel | None) -> tuple[PreTrainedModel | None, str | None]:
    """Split a model argument into the loaded model, or None, and its name."""
    if model is None or isinstance(model, (str, Path)):
        return None, None if model is None else str(model)
    if not hasattr(model, "base_model") or not hasattr(model, "config"):
        raise UserError(f"model is a {type(model).__name__}: pass a hub id, a folder, or a transformers model")
    return model, model.name_or_path or type(model).__name__


def _rows(data: Data | None, name: str) -> tuple[Any, str | None]:
    """Split a data argument into data in memory, or None, and its name."""
    if data is None or isinstance(data, (str, Path)):
        return None, None if data is None else str(data)
    return data, name
