"""What mkdocs does besides rendering the pages of docs/ (mkdocs.yml names this file).

- README.md is the front page; CHANGELOG.md and CONTRIBUTING.md become pages.
- Pages that are made from the code: commands and options, the Python API, the examples, the launch files.
- The notebooks of docs/tutorials become pages; the files can be downloaded there.
- Equations in blocks called `math` become MathML, which browsers show without a script.
- A page that would fetch anything from a network fails the build.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import saekit

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import notebooks  # noqa: E402  # docs/tools is no package
import options  # noqa: E402

LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml"}
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link(?! rel=\"(?:canonical|edit)))\b[^>]*?(?:src|href)=\"?https?:[^>]*>"
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let superfences render equations."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _math})
    return config


def _math(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "options.md": options.page(),
        "python.md": _api(),
        "examples.md": _sources("Examples", ROOT / "examples", "In the folder `examples` of the repository."),
        "accelerate_configs.md": _sources(
            "Launch files", ROOT / "accelerate_configs", "`saekit train --launch NAME` takes these by their names."
        ),
    }
    pages |= {f"tutorials/{file.stem}.md": _notebook(file) for file in notebooks.FOLDER.glob("*.ipynb")}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _notebook(file: Path) -> str:
    page = notebooks.markdown(json.loads(file.read_text(encoding="utf-8")))
    page = re.sub(r"(\]\([\w-]+)\.ipynb\)", r"\1.md)", page)
    return f"{page}\n---\n\n[Download this notebook]({file.name})\n"


def _api() -> str:
    names = sorted((name for name in saekit.__all__ if not name.startswith("_")), key=str.lower)
    functions = [name for name in names if name[0].islower()]
    classes = [name for name in names if name[0].isupper()]
    entries = [_entry(getattr(saekit, name)) for name in (*functions, *classes)]
    return (
        "# Python API reference\n\n[The API](api.md) explains these names with examples. The fields of `ModelConfig`, "
        "`DataConfig`, `SaeConfig` and `TrainConfig` are the [options](options.md) of the command line.\n\n"
        + "\n".join(entries)
    )


def _entry(named: Any) -> str:
    fields = "    options:\n      members: [from_yaml, to_yaml]\n" if dataclasses.is_dataclass(named) else ""
    return f"::: {named.__module__}.{named.__qualname__}\n{fields}"


def _sources(title: str, folder: Path, said: str) -> str:
    parts = [f"# {title}\n\n{said}\n"]
    for file in sorted(folder.iterdir()):
        if language := LANGUAGES.get(file.suffix):
            parts.append(f"## {file.name}\n\n````{language}\n{file.read_text(encoding='utf-8')}````\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right in the repository into ones that are right on the site."""
    if page.file.src_uri.startswith("tutorials/"):
        return markdown  # they are below docs/ in both
    outside = page.file.src_uri in ("index.md", "CHANGELOG.md", "CONTRIBUTING.md")
    return re.sub(
        r"(\]\()(?!https?:)([^)\s]+)(\))", lambda found: found[1] + _on_site(found[2], outside) + found[3], markdown
    )


def _on_site(target: str, outside: bool) -> str:
    target = re.sub(r"\.ipynb$", ".md", target)
    if outside:
        return target.removeprefix("docs/")
    if not target.startswith("../"):
        return target
    target = target.removeprefix("../")
    if target.startswith("examples/"):
        return "examples.md#" + re.sub(r"[^\w-]", "", target.removeprefix("examples/"))
    return {"README.md": "index.md", "accelerate_configs": "accelerate_configs.md"}.get(target, target)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads something from elsewhere."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} would load something over the network: {found[0][:200]}")
    return output
