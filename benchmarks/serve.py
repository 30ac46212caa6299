"""How quick and how small is `saekit report --serve` on large dictionaries? 8 layers of 65,536 latents each.

    python benchmarks/serve.py

The data is made up, and written by the project's own writer: every latent has all its contexts, in a text of a million
tokens. The page's tables and charts are of small SAEs of random directions, on the demo's model with two more layers.
The real command serves it. Where there is a Chromium, it opens the page and searches the contexts. Ends with code 1 if
the first page takes a second or more, or if the server holds 500 MB or more.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from common import HERE, OFFLINE, hardware, spread, versions
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit
from saekit.analysis.eval_checkpoint import EvalOptions, joined
from saekit.demo import MODEL_DIR, standard_library
from saekit.views.page.build import Gathering
from saekit.views.page.folder import identity, read_index
from saekit.views.page.render import render_served
from saekit.views.page.writing import new_folder

SECONDS, BYTES = 1.0, 500e6
WORDS = ("import", "self.assertEqual", "for i in range", "e")
"""To search the contexts for."""
OPENED = 200
"""Latents."""
SMALL, EVALUATED = 256, 16_384
"""Latents of the real SAEs, and tokens that they are evaluated on."""
NOTHING_ASKED = {
    **dict.fromkeys(("dataset", "split", "model", "other_model", "max_tokens", "latents")),
    "include_training_data": False,
}
"""The options of the command below."""
console = Console()


def main(
    layers: Annotated[int, typer.Option(help="Layers of the language model.")] = 8,
    num_latents: Annotated[int, typer.Option(help="Latents of each.")] = 65_536,
    tokens: Annotated[int, typer.Option(help="Of the text that has the contexts.")] = 2**20,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = HERE / "results" / "serve.json",
) -> None:
    """Make a report and look at it."""
    with tempfile.TemporaryDirectory(prefix="saekit-serve-") as work:
        saes = make_checkpoint(Path(work), layers)
        report = Path(work) / "report"
        start = time.perf_counter()
        make_report(Path(work), report, num_latents, tokens)
        record: dict[str, Any] = {
            "date": date.today().isoformat(),
            "hardware": hardware(),
            "versions": versions(sys.executable),
            "layers": layers,
            "num_latents": num_latents,
            "tokens": tokens,
            "writing_seconds": time.perf_counter() - start,
            "report_bytes": sum(file.stat().st_size for file in report.iterdir()),
        }
        command = [sys.executable, "-m", "saekit", "report", "--serve", "--port", "0", str(saes), "-o", str(report)]
        record |= look(command, report)
    console.print_json(json.dumps(record))
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    slowest = max(record["first_page_seconds"]["max"], record.get("chromium", {}).get("first_page_seconds", 0))
    if slowest >= SECONDS or record["resident_bytes"]["after_everything"] >= BYTES:
        raise typer.Exit(1)


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write a model, a text and small SAEs; return the folder of the SAEs."""
    width = make_model(folder / "model", layers)
    lines = (json.dumps({"text": each}) + "\n" for each in islice(standard_library(), 40))
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    for layer in range(layers):
        saekit.save(random_sae(width, SMALL, layer), folder / "saes" / f"layers.{layer}")
    return folder / "saes"


def make_report(folder: Path, report: Path, num_latents: int, tokens: int) -> None:
    """Write a report of the small SAEs, in which each layer has made-up data of as many latents."""
    options = EvalOptions(str(folder / "text.jsonl"), model=str(folder / "model"), max_tokens=EVALUATED)
    with joined(quiet=True) as placement:
        gathering = Gathering(folder / "saes", options, placement, console.print, lambda done, of: None)
        length = gathering.text_ST.shape[1]
        text_ST = np.resize(gathering.text_ST, (tokens // length, length))
        with new_folder(report) as writer:
            text = writer.add_text(text_ST)
            for number, (arrays, silent, facts) in enumerate(gathering.layers(None)):
                large = made_up(arrays, num_latents, text_ST.size, seed=number)
                facts |= {"num_latents": num_latents, "tokens": tokens, "columns": writer.add_layer(large | silent)}
            page = render_served(gathering.content(), writer.build, text)
            writer.finish(page, identity(folder / "saes"), NOTHING_ASKED)


def made_up(small: dict[str, np.ndarray], num_latents: int, places: int, seed: int) -> dict[str, np.ndarray]:
    """Arrays like those of a small layer, each row a random one's, with contexts all over the text."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(small["latents"]), size=num_latents)
    arrays = {name: array[rows] for name, array in small.items()}
    arrays["latents"] = np.arange(num_latents)
    arrays["counts"] = (num_latents / rng.integers(1, num_latents, num_latents)).astype(np.int64)
    arrays["places"] = rng.integers(places, size=arrays["places"].shape)
    arrays["shades"] = rng.integers(256, size=arrays["shades"].shape)
    arrays["neighbours"] = rng.integers(num_latents, size=arrays["neighbours"].shape)
    return arrays


def make_model(folder: Path, layers: int) -> int:
    """Write the demo's model with as many layers, those that it lacks copies of its last; return its width."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    last = config.num_hidden_layers - 1
    for layer in range(last + 1, layers):
        for name in [each for each in state if f"layers.{last}." in each]:
            state[name.replace(f"layers.{last}.", f"layers.{layer}.")] = state[name]
    config.num_hidden_layers = layers
    larger = type(model)(config)
    larger.load_state_dict({name: state[name] for name in larger.state_dict()})
    larger.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return config.hidden_size


def random_sae(width: int, num_latents: int, seed: int) -> saekit.Sae:
    """An SAE of random directions, the decoder the encoder's transpose."""
    torch.manual_seed(seed)
    sae = saekit.Sae(width, num_latents, 32)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(num_latents, width)))
        sae.W_enc.copy_(sae.W_dec)
    return sae


def environment() -> dict[str, str]:
    """Of the commands: no hub, no GPU."""
    return os.environ | OFFLINE | {"CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def served(command: list[str]) -> Iterator[tuple[str, psutil.Process, float]]:
    """The address, the process that serves and how long it took to start; Ctrl-C ends it."""
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield found[0], psutil.Process(process.pid), time.perf_counter() - start
        process.send_signal(signal.SIGINT)
        process.stdout.read()  # what it still says, or closing the pipe would make it fail
    if process.returncode:
        raise RuntimeError(f"saekit report --serve ended with code {process.returncode}")


def look(command: list[str], report: Path) -> dict[str, Any]:
    """Ask for what a browser asks for, then for everything that searches ask for, and see how large the server gets."""
    index = read_index(report)
    build, layers, rows = index.build, len(index.layers), index.layers[0][0].rows
    first = ["", f"{build}/text", *(f"{build}/layers/0/columns/{name}" for name in ("latents", "counts", "favorites"))]
    first.append(f"{build}/layers/0/rows/0")
    latents = [f"{build}/layers/{n % layers}/rows/{n * 7919 % rows}" for n in range(OPENED)]
    columns = [
        f"{build}/layers/{layer}/columns/{name}"
        for layer in range(layers)
        for name in ("places", "favorites", "shares", "promoted", "rises")
    ]
    with served(command) as (url, process, started):
        resident = {"started": process.memory_info().rss}
        found = {
            "start_seconds": started,
            "first_page_seconds": spread([seconds(url, first) for _ in range(5)]),
            "first_page_bytes": sum(len(get(url + each)) for each in first),
            "latent_seconds": spread([seconds(url, [each]) for each in latents]),
        }
        resident["after_latents"] = process.memory_info().rss
        found["all_search_columns_seconds"] = seconds(url, columns)
        found |= in_chromium(url)
        resident["after_everything"] = process.memory_info().rss
    return found | {"resident_bytes": resident}


def get(url: str) -> bytes:
    """What an address has."""
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def seconds(url: str, addresses: list[str]) -> float:
    """How long it takes to get them, one after another."""
    start = time.perf_counter()
    for each in addresses:
        get(url + each)
    return time.perf_counter() - start


def in_chromium(url: str) -> dict[str, Any]:
    """Time to the first latent on the screen, and of searches; nothing where there is no Chromium or no playwright."""
    program = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {}
    if program is None:
        return {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        browser.new_page().goto("about:blank")  # the browser's own start is not the page's
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(url, wait_until="commit")
        page.wait_for_selector("#feature[aria-busy=false]")
        first = time.perf_counter() - start
        searches = {}
        for word in WORDS:
            start = time.perf_counter()
            page.fill("#quote", word)
            page.wait_for_selector(f"#list[data-query={json.dumps(word)}]", state="attached")
            searches[word] = {"seconds": time.perf_counter() - start, "said": page.inner_text("#list-note")}
        browser.close()
    return {"chromium": {"first_page_seconds": first, "context_search": searches}}


if __name__ == "__main__":
    typer.run(main)
