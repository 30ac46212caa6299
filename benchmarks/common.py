"""What the benchmarks share: data from local text, environments for the peers, subprocesses, hardware."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).parent
PEERS = {
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary-learning": "dictionary-learning==0.1.0",
    "dictionary-learning fork": "dictionary_learning @ git+https://github.com/jkminder/dictionary_learning"
    "@48debb2707c7c1409fcead66dea3b4118e343afa",
}
"""The package of each peer. Each has its own environment, since they need different releases of the same packages."""
LOG_LINES = 30
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Job:
    """One training run. Every toolkit's script gets the same file."""

    model: str
    """Folder of the language model."""
    data: str
    """Folder of the training sequences (`save_to_disk`), in training order."""
    out: str
    """Folder for the SAEs, one folder per hookpoint."""
    hookpoints: list[str]
    num_latents: int
    k: int
    batch_size: int
    """Sequences per optimizer step."""
    exclude_tokens: list[int]
    seed: int
    """The seed of the initial weights."""
    settings: dict[str, Any]
    """Options by the toolkit's own names. Other options keep the toolkit's defaults."""
    reads: list[str] | None = None
    """For transcoders: the hookpoint that is read to predict each of `hookpoints`. None for others."""
    crosscode: bool = False
    """Whether one crosscoder reads and writes all hookpoints, instead of one SAE per hookpoint."""


def prepare_tokens(tokenizer: Any, ctx_len: int, train: int, held_out: int, folder: Path, seed: int = 0) -> Path:
    """Tokenize Python's standard library, split it by documents, and save `train` and `heldout` in `folder`.

    A random twentieth of the documents is held out. The sequences of each part are shuffled here, so a toolkit that
    trains on them must not shuffle again. If the text is too short, it is repeated, each time in another order.

    Args:
        tokenizer: The language model's tokenizer.
        ctx_len: Tokens per sequence.
        train: Sequences to train on.
        held_out: The largest number of sequences to evaluate on.
        folder: The folder for the two data sets.
        seed: The seed of the split and of both orders.
    """
    from datasets import Dataset, concatenate_datasets

    from saekit.data import chunk_and_tokenize
    from saekit.demo import standard_library

    documents = Dataset.from_dict({"text": list(standard_library())}).shuffle(seed=seed)
    border = len(documents) // 20
    parts = {
        "heldout": (documents.select(range(border)), held_out),
        "train": (documents.select(range(border, len(documents))), train),
    }
    for name, (part, wanted) in parts.items():
        packed = chunk_and_tokenize(part, tokenizer, max_seq_len=ctx_len, num_proc=1)
        passes = -(-wanted // len(packed)) if name == "train" else 1
        ordered = concatenate_datasets([packed.shuffle(seed=seed + number) for number in range(passes)])
        ordered.select(range(min(wanted, len(ordered)))).flatten_indices().save_to_disk(folder / name)
    return folder


def peer_python(given: Path | None, say: Any, peer: str = "sparsify") -> Path:
    """Return the Python of a peer: the given one, or that of an environment next to this file, made if missing."""
    if given is not None:
        return given
    folder = HERE / (".venv-peers" if peer == "sparsify" else f".venv-peers-{peer.replace(' ', '-')}")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    finished = folder / ".complete"
    if not finished.exists():
        say(f"Making an environment for {PEERS[peer]} in {folder.relative_to(HERE.parent)} (once; minutes)")
        venv.create(folder, with_pip=True, clear=True)
        import transformers

        # Install torch first, in the version of this environment, so that the peer's looser bound does not choose
        # another release, with other matmuls or for another GPU driver. Install transformers in the version of this
        # environment, so that all toolkits read the same activations. Name torch again with them, so that no dependency
        # of the peer replaces it.
        same_torch = f"torch=={torch.__version__.partition('+')[0]}"
        for packages in ([same_torch], [same_torch, PEERS[peer], f"transformers=={transformers.__version__}", "numpy"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        # torchvision is installed for images, in a build that may not fit torch, and then transformers cannot be
        # imported.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        finished.touch()
    return python


def run_script(python: Path | str, script: str, *arguments: str | Path) -> float:
    """Run a script of this folder in its own process, offline and on the CPU. Return its wall time in seconds.

    Raises:
        RuntimeError: If it fails. The message contains the end of its output.
    """
    env = os.environ | OFFLINE | {"SPARSIFY_DISABLE_TRITON": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), str(HERE / script), *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-LOG_LINES:])
        raise RuntimeError(f"{script} ended with code {done.returncode}:\n{tail}")
    return time.perf_counter() - start


def json_from(python: Path | str, script: str, job: dict[str, Any], folder: Path, **env: str) -> dict[str, Any]:
    """Run a worker of this folder on a job, and return the last line of its output, read as JSON.

    Raises:
        RuntimeError: If it fails. The message contains the end of its output.
    """
    file = folder / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    hidden = {} if job.get("device", "cpu") != "cpu" else {"CUDA_VISIBLE_DEVICES": "", "SPARSIFY_DISABLE_TRITON": "1"}
    done = subprocess.run(
        [str(python), str(HERE / script), str(file)],
        env=os.environ | OFFLINE | hidden | env,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-LOG_LINES:])
        raise RuntimeError(f"{script} ended with code {done.returncode}:\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def activations(tokens: int, d_in: int, seed: int = 0) -> torch.Tensor:
    """Make synthetic residual-stream activations, float32 `[tokens, d_in]`: sums of a few of 4·D directions, and noise.

    Directions are drawn with frequencies proportional to 1 / rank, so that some latents fire far more often than
    others, as with a language model. Equal frequencies would favor a tool that sorts by latent.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * d_in, d_in, generator=generator) / d_in**0.5
    frequency = 1 / torch.arange(1.0, 4 * d_in + 1)
    x = 0.1 * torch.randn(tokens, d_in, generator=generator) / d_in**0.5
    for _ in range(16):
        chosen = torch.multinomial(frequency, tokens, replacement=True, generator=generator)
        x += torch.rand(tokens, 1, generator=generator) * directions[chosen]
    return x * d_in**0.5


def auto_type(size: str, device: torch.device) -> str:
    """Return the type that `--select-dtype auto` chooses for a size D,M,k,N. On a CPU it is measured, or cached."""
    from saekit.sae.kernels import auto_backend, likely_type
    from saekit.sae.kernels.fastest import Work, fastest, seconds_by_type

    d_in, num_latents, k, tokens = map(int, size.split(","))
    work = Work(tokens, d_in, num_latents, k)
    if device.type != "cpu" or not work.is_measured:
        return likely_type(device)
    return fastest(seconds_by_type(auto_backend(device), work))


def train(python: Path | str, script: str, job: Job) -> float:
    """Run a training script on `job`. Return its wall time in seconds, including start-up."""
    out = Path(job.out)
    out.mkdir(parents=True)
    file = out.parent / f"{out.name}.job.json"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    return run_script(python, script, file)


def versions(python: Path | str) -> dict[str, str]:
    """Return the versions of Python and of relevant packages in the environment of `python`."""
    code = (
        "import json, platform\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "found = {'python': platform.python_version()}\n"
        "for name in ('saekit', 'eai-sparsify', 'dictionary-learning', 'schedulefree', 'torch', 'triton', "
        "'transformers', 'bitsandbytes'):\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: pass\n"
        "import sys; sys.stdout.write(json.dumps(found))\n"
    )
    return json.loads(subprocess.check_output([str(python), "-c", code], text=True))


def fingerprint(model: Path) -> str:
    """Return an id of the weights in a model's folder: the start of their SHA-256."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def hardware() -> dict[str, Any]:
    """Describe the hardware of the measurements, without anything that identifies the machine."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or sys.platform
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
