"""The functions of the API: train, evaluate and load SAEs from Python, as the command line does.

torch and the other heavy libraries are imported by the functions that need them: `import saekit` takes no time.
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
"""The name of a data set that has none; no data set on the hub can be called so."""
EVAL_IN_MEMORY = "evaluation data in memory"
OF_LOADING = ("revision", "dtype", "load_in_8bit", "shard_lm")
"""Options about how the language model is loaded: they mean nothing for one that is loaded."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options(function: Function) -> Function:
    """Show the options of the configuration in a function's signature and docstring, in place of its `**options`."""
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
    """Train one SAE per layer of a language model, with everything that `saekit train` does.

    In a plain script there is one process. In a script that `accelerate launch` or `torchrun` started, every rank makes
    the same call, and the ranks train together under the placement that the launch file or `placement` says.

    Args:
        model: The language model: a hub id, a local folder, or a loaded model. A loaded model is only read; it stays
            on its device, and under a launcher it moves to the rank's device. May be left out if `config` names it, or
            with `resume`.
        dataset: The text: a hub id, a local folder or file, or data in memory: a `datasets.Dataset` (also a stream, or
            a `DatasetDict`) with a column of text or a column `input_ids`, or a list of texts. May be left out like
            `model`.
        config: A YAML file of options, as for `saekit train --config`. Arguments take precedence over it.
        eval_dataset: What `eval_every` evaluates on, in the same forms as `dataset`. By default documents of `dataset`
            that the run does not read; for data in memory it must be given.
        tokenizer: For a loaded model; by default the tokenizer of the folder or hub id that it was loaded from.
        other_model: A loaded model for crosscoders of two models, instead of one that `crosscode_models` names. It is
            only read, and moved to the device of `model`.
        other_tokenizer: For that, as `tokenizer`; the two must give the same token ids.
        reporter: What shows the progress; by default the live view, or plain lines if there is no terminal.
        options: The options of `saekit train`, by the same names with underscores (`batch_size=8`, `ctx_len=1024`,
            `layers="0-10:2"` or `layers=[0, 2]`). None stands for the default.

    Returns:
        The folder of the last checkpoint, on every rank. `load_many` and `evaluate` read it.

    Raises:
        UserError: If there is no option of a name, a value cannot be used, a file, model or data set cannot be read, or
            NaN or Inf ends the run (`SaeTrainer.fit`).
        SaveError: If a checkpoint cannot be written.
        Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, when the step is finished and its checkpoint is written.
    """
    loaded, model_name = _loaded_model(model)
    if other_model is not None:
        if "crosscode_models" in options:
            raise UserError("crosscode_models and other_model both say which model to compare with: give one of them")
        other_model, options["crosscode_models"] = _loaded_model(other_model)
        if other_model is None:
            raise UserError("other_model is a name: give a loaded model, or the name as crosscode_models")
    rows, dataset_name = _rows(dataset, IN_MEMORY)
    eval_rows, eval_name = _rows(eval_dataset, EVAL_IN_MEMORY)
    given = {"model": model_name, "dataset": dataset_name, "eval_dataset": eval_name, **options}
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := unknown_options(given, option_names(*PARTS)):
        raise UserError("; ".join(unknown))
    values = all_options(given, None if config is None else Path(config))
    for name in ("model", "dataset"):
        if name not in values:
            raise UserError(f"{name} is missing: give it, or a config that names it")
    cfg = RunConfig.from_flat(values)
    by_name = loaded is None or (cfg.train.crosscode_models is not None and other_model is None)
    if not by_name and (useless := [name for name in OF_LOADING if name in given]):
        raise UserError(
            f"{useless[0]}={given[useless[0]]!r} is about loading the model, and the model is loaded already"
        )
    if (loaded is None and tokenizer is not None) or (other_model is None and other_tokenizer is not None):
        raise UserError("a tokenizer is for a loaded model: leave it out, or give the model loaded as well")
    if rows is not None and cfg.train.eval_every is not None and cfg.data.eval_dataset in (None, cfg.data.dataset):
        raise UserError("eval_every needs an eval_dataset: of data in memory, no part is held out")

    from saekit.training.launch import train_from_config
    from saekit.training.live import InMemory

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
    """Evaluate SAEs as `saekit eval` does: reconstruction, and what splicing it in costs the language model.

    The results are also written to `eval.json` in the checkpoint. Ranks that a launcher started share the work.

    Args:
        checkpoint: The folder of a run (its latest checkpoint), of a checkpoint, or of one SAE.
        dataset: A hub id, a local folder or a file; by default the documents of the run's own data set that the run
            did not read.
        split: The split of the data set; by default the run's.
        model: The language model's hub id or folder; by default the one that the run was trained on.
        other_model: The same of the second model, of crosscoders of two.
        max_tokens: How much to evaluate on, in tokens.
        batch_size: Sequences per forward pass of the language model, on each rank.
        include_training_data: Whether to evaluate also on documents that the run was trained on.
        verify: Whether the SAEs' files must have the checksums that their checkpoint lists.

    Returns:
        The results of every layer, each number with its confidence interval; `to_json()` gives plain values.

    Raises:
        UserError: If something is missing, damaged or cannot be read, or if no held-out data is left.

    Warns:
        UserWarning: If results look wrong: for SAEs of another model or another hookpoint, or from few sequences.
    """
    for name, value, optional in (
        ("checkpoint", checkpoint, False),
        ("dataset", dataset, True),
        ("model", model, True),
        ("other_model", other_model, True),
    ):
        if not isinstance(value, (str, Path)) and not (optional and value is None):
            raise UserError(f"{name} is a {type(value).__name__}: give a path or a name, as for saekit eval")
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
    """Load one SAE. Its format is recognized by its files: saekit's own, which is sparsify's; SAELens'; a plug-in's.

    If it lies in a checkpoint, its files are compared with the checkpoint's checksums.

    Args:
        path: The folder of an SAE, a run (its latest checkpoint) or a checkpoint; or a hub id such as
            `EleutherAI/sae-llama-3-8b-32x`.
        hookpoint: Which SAE of a folder or repository with several, such as `layers.3`.
        device: Where the parameters go.
        format: The name of the format to look for, where a folder could be read in several.
        verify: Whether the files must have the checksums that the checkpoint lists.
        hub_options: Passed to `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).

    Raises:
        UserError: If there is no such SAE, if several are there and `hookpoint` is not given, if several formats
            recognize a folder, or if a file is damaged, has changed, or describes what saekit cannot compute.
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
    """Load all SAEs of a run (its latest checkpoint), of a folder with several, or of a repository on the hub.

    Args:
        path: A folder or a hub id.
        device: Where the parameters go.
        format: The name of the format to look for, where folders could be read in several.
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
        folder: Where the files go; it is made if necessary.
        format: `sparsify`, which is saekit's own; `saelens`; or the name of a plug-in's.
        metadata: What readers should know besides, such as the language model's name, where the format has a place
            for it; `saekit.save_as_saelens` says what SAELens expects.

    Raises:
        UserError: If there is no such format, if it cannot say something about this SAE (nothing is written then), or
            if the files cannot be written.
    """
    from saekit.runs.opening import user_errors
    from saekit.sae import Sae
    from saekit.sae.formats.base import formats

    if not isinstance(sae, Sae):
        raise UserError(f"sae is a {type(sae).__name__}: give an Sae, such as saekit.load returns")
    with user_errors():
        (chosen,) = formats(format)
        chosen.write(sae, Path(folder).expanduser(), metadata)


def _loaded_model(model: str | Path | PreTrainedModel | None) -> tuple[PreTrainedModel | None, str | None]:
    """Return a model that is loaded already, if it is, and its name."""
    if model is None or isinstance(model, (str, Path)):
        return None, None if model is None else str(model)
    if not hasattr(model, "base_model") or not hasattr(model, "config"):
        raise UserError(f"model is a {type(model).__name__}: give a hub id, a folder, or a model of transformers")
    return model, model.name_or_path or type(model).__name__


def _rows(data: Data | None, name: str) -> tuple[Any, str | None]:
    """Data that is in memory, if it is, and its name."""
    if data is None or isinstance(data, (str, Path)):
        return None, None if data is None else str(data)
    return data, name
