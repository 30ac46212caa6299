"""Every relative link in the documents leads to a file that is there, and to a heading that is there."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "docs/**/*.ipynb", "saekit/demo/model/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")
CODE = re.compile(
    r"^```.*?^```|(?:(?<=\n\n)|\A)(?:(?:    |\t)[^\n]*\n|\n(?=    ))+|`[^`\n]+`", re.DOTALL | re.MULTILINE
)


def text_of(document):
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def links(document):
    for found in LINK.finditer(CODE.sub("", text_of(document))):
        target = found[1] or found[2]
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(document):
    """As GitHub makes them of headings; mkdocs.yml says the same to the site."""
    text = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = sum(1 for each in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each))
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken(document):
    for target in links(document):
        path, _, anchor = target.partition("#")
        file = (document.parent / unquote(path)) if path else document
        if not file.resolve().is_relative_to(ROOT) or not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert list(broken(document)) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_docs_links.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `cfg.json`, twice\n\n```\n# not a heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-cfgjson-twice) [c](none.md) ![d](none.png) [e](#here) [f](https://x.org/no)\n"
        "[g](other.md#not-a-heading) [h](../outside.md)\n\n## Here\n\n    [code](no.md)\n\nand `[code](nowhere.md)`\n"
    )
    assert [each.split(":")[0] for each in broken(page)] == [
        "none.md", "none.png", "other.md#not-a-heading", "../outside.md"
    ]  # fmt: skip
