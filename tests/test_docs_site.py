"""The site has every page, the reference of options every option, and the site builds without a warning."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from saekit.config.options import options_of
from saekit.config.run import PARTS

ROOT = Path(__file__).parents[1]
MADE = {
    "index.md",
    "options.md",
    "python.md",
    "examples.md",
    "accelerate_configs.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}
"""Pages that docs/tools/hooks.py adds to those in docs/."""


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without its functions."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def pages(nav):
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_is_in_the_navigation_once():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    written = {page.name for page in (ROOT / "docs").glob("*.md")}
    tutorials = {f"tutorials/{notebook.stem}.md" for notebook in (ROOT / "docs" / "tutorials").glob("*.ipynb")}
    assert sorted(pages(config["nav"])) == sorted(MADE | written | tutorials)


def test_the_reference_has_every_option_of_every_command():
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "docs" / "tools" / "options.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    commands = dict(re.findall(r"^## saekit (\w+)\n(.*?)(?=^## |\Z)", made.page(), re.DOTALL | re.MULTILINE))
    names = {"--" + option.name.replace("_", "-") for part in PARTS for option in options_of(part)}
    assert len(names) > 50
    assert {name for name in names if f"| `{name}`" not in commands["train"]} == set()
    assert "| `--k` <code>N</code> | Active latents per token" in commands["train"]
    assert "| `--dtype` <code>auto&#124;float32&#124;bfloat16&#124;float16</code> |" in commands["train"]
    assert "\\[latents; default: 32]" in commands["train"]
    assert "`--calibrate`" in commands["plan"]
    assert "[saekit train](#saekit-train)" in commands["plan"]
    assert "```bash\n# One SAE per layer of the residual stream\nsaekit train " in commands["train"]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    # With --quiet there would be no warnings for --strict to count.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "options.html").is_file()
    tutorial = (tmp_path / "site" / "tutorials" / "first-sae.html").read_text(encoding="utf-8")
    assert "CE recovered" in tutorial
    assert 'href="features.html"' in tutorial
