"""The tables of docs/quality-sweeps.md say what the file of results says: none is forgotten, none is from memory."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quality-sweeps.md").read_text(encoding="utf-8")
SUMMARY = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
RUNS = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text(encoding="utf-8"))["runs"]
MODELS = {"The demo LM": "saekit demo LM", "MiniLM-L6": "MiniLM-L6"}
HEADING = re.compile(r"### ([^,\n]+), ([\d,]+) tokens, ([\d,]+) latents, k (\d+)\n\n(.+?)(?:\n\n|\Z)", re.DOTALL)
COLUMNS = {"FVU": "fvu", "dead %": "dead", "CE recovered": "ce_recovered", "KL": "kl"}
KINDS = ("batchtopk", "groupmax", "matryoshka")


def table(text):
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def label(cell):
    name = re.sub(r" \(\d+ seeds\)$", "", cell.replace("**", ""))
    return "saekit defaults" if name == "saekit, defaults" else name


def measured(runs, column):
    """As the tables have it: means over layers and seeds, dead latents in percent."""
    hookpoint = column.strip("`")
    if hookpoint in runs[0]["layers"]:
        return statistics.fmean(run["layers"][hookpoint]["fvu"] for run in runs)
    number = COLUMNS[column]
    mean = statistics.fmean(layer[number] for run in runs for layer in run["layers"].values())
    return 100 * mean if number == "dead" else mean


@pytest.mark.parametrize("found", list(HEADING.finditer(PAGE)), ids=lambda found: f"{found[1]} {found[2]}")
def test_tables_of_sweeps_are_the_results(found):
    tokens, latents, k = (int(number.replace(",", "")) for number in found.group(2, 3, 4))
    here = {"model": MODELS[found[1]], "tokens": tokens, "num_latents": latents, "k": k}
    runs = [run for run in RUNS if here.items() <= run.items() and not any(kind in run["recipe"] for kind in KINDS)]
    rows = table(found[5])
    assert {label(row[""]) for row in rows} == {run["recipe"] for run in runs}
    for row in rows:
        own = [run for run in runs if run["recipe"] == label(row[""])]
        for column, cell in row.items():
            if column:
                digits = 2 if column == "dead %" else 4
                assert float(cell.split()[0]) == pytest.approx(measured(own, column), abs=0.5001 * 10**-digits)


def test_all_results_have_a_table():
    headings = {(MODELS[found[1]], int(found[2].replace(",", "")), int(found[4])) for found in HEADING.finditer(PAGE)}
    assert len(headings) >= 4
    assert {(run["model"], run["tokens"], run["k"]) for run in RUNS} == headings


def test_the_summary_has_saekit_and_the_best_peer_of_each_table():
    summary = re.search(r"^\| model, tokens \|.*?\n\n", SUMMARY, re.DOTALL | re.MULTILINE)[0].strip()
    shown = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in summary.splitlines()[2:]]
    tables = [table(found[5]) for found in sorted(HEADING.finditer(PAGE), key=lambda found: found[1] == "MiniLM-L6")]
    assert len(shown) == len(tables) == 4
    for (_, fvu, dead, peer, peer_fvu, peer_dead), (ours, *theirs) in zip(shown, tables, strict=True):
        best = min(theirs, key=lambda row: float(row["FVU"]))
        assert [fvu, dead] == [ours["FVU"].split()[0], ours["dead %"]]
        assert [peer_fvu, peer_dead] == [best["FVU"], best["dead %"]]
        assert peer.lower().replace(",", "").startswith(best[""])
