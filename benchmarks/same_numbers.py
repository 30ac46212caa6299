"""Checks that a change of the code changes no numbers: record short runs before and after it, and compare them.

    python benchmarks/same_numbers.py record before --tree ../saekit-before
    python benchmarks/same_numbers.py record after
    python benchmarks/same_numbers.py compare before after

Every run uses the command line of the saekit in `--tree`, with one thread. The model and the tokens are made once per
folder from fixed seeds. Runs in one process must agree bit for bit: weights, moments, counters, thresholds and every
number in `metrics.jsonl` that does not depend on the clock. Runs on several ranks must agree to 1e-5, relative to the
norm of a tensor. Runs with a threshold must agree to 1e-6, because older versions took its logarithm with libm, newer
ones with torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# transformers imports a package `kernels`, which must not be this folder's `kernels.py`.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]
CTX_LEN, STEPS, BATCH = 16, 12, 12
TIMED = {"time", "tokens_per_second", "memory_bytes", "seconds", "time_per_step", "eta"}
COMMON = [
    *("--ctx-len", CTX_LEN, "--batch-size", BATCH, "--num-latents", 192, "--k", 4, "--lr", "1e-3"),
    *("--lr-warmup-steps", 2, "--dead-feature-threshold", 300, "--exclude-tokens", 5, "--dtype", "float32"),
    *("--select-dtype", "fp32", "--log-every", 2),
]
AUXK = ["--auxk-alpha", 1 / 32]
HALVES = ["--grad-acc-steps", 2, "--batch-size", BATCH // 2]
RUNS: dict[str, list[Any]] = {
    "topk": [],
    "topk-default-rate": ["--lr", "DEFAULT"],
    "topk-bf16-model": ["--dtype", "bfloat16", "--select-dtype", "bf16"],
    "topk-int8": ["--num-latents", 1024, "--select-dtype", "int8"],
    "topk-eager": ["--kernels", "eager", *AUXK],
    "topk-cpu-kernels": ["--kernels", "cpu", *AUXK],
    "topk-splits": [*HALVES, "--micro-acc-steps", 3, *AUXK],
    "topk-uniform-auxk-residual": ["--init", "uniform", "--auxk-relative-to", "residual", *AUXK, "--no-scale-biases"],
    "topk-long-tokens": ["--max-norm-multiple", 1, *HALVES],
    "multi-topk": ["--multi-topk", *AUXK],
    "batchtopk": ["--activation", "batchtopk"],
    "batchtopk-splits-long": ["--activation", "batchtopk", "--micro-acc-steps", 2, "--max-norm-multiple", 1],
    "groupmax": ["--activation", "groupmax", *AUXK],
    "matryoshka": ["--matryoshka", "0.2,0.5,1"],
    "matryoshka-batchtopk": ["--matryoshka", "0.2,0.5,1", "--activation", "batchtopk"],
    "adam8bit": ["--optimizer", "adam8bit"],
    "signum": ["--optimizer", "signum", "--activation", "batchtopk"],
    "muon": ["--optimizer", "muon"],
    "bf16-moments": ["--moments-dtype", "bf16"],
    "some-layers": ["--layers", "1", "--activation", "groupmax"],
    "eval-every": ["--eval-every", 5, "--eval-tokens", 256, "--eval-dataset", "TOKENS"],
}
"""Options of each run in one process, in addition to `COMMON`."""
RANKS: dict[str, list[Any]] = {
    "ddp": ["--placement", "ddp", "--activation", "batchtopk"],
    "ddp-splits": ["--placement", "ddp", "--micro-acc-steps", 2, *AUXK],
    "layer-map": ["--placement", "layer-map", "--activation", "batchtopk"],
    "layer-map-auxk": ["--placement", "layer-map", *AUXK, "--matryoshka", "0.2,0.5,1"],
    "zero3": ["--placement", "zero3", "--activation", "groupmax"],
    "zero3-batchtopk": ["--placement", "zero3", "--activation", "batchtopk", "--matryoshka", "0.5,1"],
}
"""Options of each run on two ranks."""


def make_inputs(folder: Path) -> None:
    """Make a Llama of three layers with random weights, a tokenizer, and tokens."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.BPE({chr(33 + number): number for number in range(256)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='"').save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (STEPS * BATCH - 5, CTX_LEN), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = 5
    Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(folder / "tokens")
    held_out = torch.randint(0, 250, (30, CTX_LEN), generator=generator)
    Dataset.from_dict({"input_ids": held_out.tolist()}).save_to_disk(folder / "held-out")


def run(folder: Path, tree: Path, name: str, options: list[Any], ranks: int = 1) -> None:
    """Run the command line once, and exit if it fails."""
    words = [str(word).replace("TOKENS", str(folder / "held-out")) for word in [*COMMON, *options]]
    while "DEFAULT" in words:  # for the default learning rate, drop this `--lr` and that of COMMON
        at = words.index("DEFAULT")
        del words[at - 1 : at + 1]
        at = words.index("--lr")
        del words[at : at + 2]
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
        words += ["--batch-size", str(BATCH // ranks)]
    command += ["saekit", "train", str(folder / "model"), str(folder / "tokens"), *words]
    command += ["--save-dir", str(folder / "runs"), "--run-name", name]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CI": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {' '.join(command)}\n{done.stderr[-3000:]}")


def record(folder: Path, tree: Path, only: list[str]) -> None:
    """Record all runs, and two that continue others: one is resumed halfway, one is fine-tuned."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").is_dir():
        make_inputs(folder)

    def wanted(name: str) -> bool:
        return not only or any(word in name for word in only)

    def resumed() -> None:
        options = ["--activation", "batchtopk", "--save-every", 5, "--keep-last", 3, *AUXK]
        run(folder, tree, "resumed", options)
        shutil.rmtree(folder / "runs" / "resumed" / f"step_{STEPS:08d}")
        run(folder, tree, "resumed", [*options, "--resume", "auto"])

    def finetuned() -> None:
        run(folder, tree, "finetune-from", [])
        run(folder, tree, "finetuned", ["--finetune", folder / "runs" / "finetune-from"])

    jobs = [lambda n=name, o=options: run(folder, tree, n, o) for name, options in RUNS.items() if wanted(name)]
    jobs += [each for each in (resumed, finetuned) if wanted(each.__name__)]
    jobs += [lambda n=name, o=options: run(folder, tree, n, o, 2) for name, options in RANKS.items() if wanted(name)]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    print(f"{len(list((folder / 'runs').iterdir()))} runs in {folder}")  # noqa: T201


def tensors_of(run_dir: Path) -> dict[str, Any]:
    """Return every tensor of a run's last checkpoint and every entry of its SAEs' `cfg.json`, by name."""
    from safetensors.torch import load_file

    latest = run_dir / "latest"
    found: dict[str, Any] = {}
    for file in sorted(latest.rglob("*.safetensors")):
        found |= {f"{file.relative_to(latest)}:{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted(latest.glob("*/cfg.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        found |= {f"{file.relative_to(latest)}:{name}": value for name, value in config.items()}
    return found


def numbers_of(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all numbers in a record of `metrics.jsonl`, except measured times, rates and memory."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in TIMED:
                yield from numbers_of(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from numbers_of(inner, f"{where}.{number}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, value


def metrics_of(run_dir: Path) -> dict[str, Any]:
    """Return the numbers of every step and evaluation, by their place in `metrics.jsonl`."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [each for each in map(json.loads, lines) if each.get("kind") in (None, "evaluation")]
    return {f"{number}{where}": value for number, each in enumerate(records) for where, value in numbers_of(each)}


def difference(one: Any, other: Any) -> float:
    """Return the difference relative to the norm of `other`; infinite if the values are of different kinds."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
        if one.dtype == other.dtype and torch.equal(one, other):
            return 0.0
        one, other = one.double(), other.double()
        return float((one - other).norm() / other.norm().clamp_min(1e-30))
    if isinstance(one, float) and isinstance(other, float):
        return 0.0 if one == other or (one != one and other != other) else abs(one - other) / max(abs(other), 1e-9)
    return 0.0 if type(one) is type(other) and one == other else float("inf")


def compare(before: Path, after: Path) -> int:
    """Print a line per run, and return the number of runs that differ too much. Skip runs without a second record."""
    failed = 0
    for run_dir in sorted((before / "runs").iterdir()):
        allowed = 1e-5 if run_dir.name in RANKS else 1e-6 if "batchtopk" in run_dir.name else 0.0
        if not (after / "runs" / run_dir.name).exists():
            print(f"{run_dir.name:30} not recorded again")  # noqa: T201
            continue
        worst, where = 0.0, ""
        for read in (tensors_of, metrics_of):
            old, new = read(run_dir), read(after / "runs" / run_dir.name)
            for name in sorted(old.keys() | new.keys()):
                found = float("inf") if name not in old or name not in new else difference(new[name], old[name])
                if found > worst:
                    worst, where = found, name
        failed += worst > allowed
        verdict = "same" if worst == 0 else f"{'FAILED' if worst > allowed else 'within'} {worst:.1e} at {where}"
        print(f"{run_dir.name:30} {verdict}")  # noqa: T201
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--tree", type=Path, default=ROOT, help="the source tree to run; this one by default")
    recording.add_argument("--only", nargs="*", default=[], help="runs whose names contain one of these words")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.folder.resolve(), arguments.tree.resolve(), arguments.only)
    else:
        sys.exit(compare(arguments.before, arguments.after))


if __name__ == "__main__":
    main()
