"""What a release says of itself, in files that no code reads, and the claims of SECURITY.md about the code."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from saekit import __version__

ROOT = Path(__file__).parents[1]
CODE = sorted((ROOT / "saekit").rglob("*.py"))
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
UNPICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert cited["license"] == re.search(r'^license = "(.*)"', PROJECT, re.MULTILINE)[1]
    assert cited["references"][0]["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_versions_of_python_are_the_same_everywhere():
    lowest = re.search(r'^requires-python = ">=3\.(\d+)"', PROJECT, re.MULTILINE)[1]
    named = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PROJECT)
    assert named[0] == lowest
    table = (ROOT / "docs" / "setup.md").read_text(encoding="utf-8").split("| Python |")[1]
    assert re.findall(r"^\| 3\.(\d+) \|", table, re.MULTILINE) == named


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_issue_forms_are_valid(name):
    form = yaml.safe_load((TEMPLATES / name).read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def calls_and_imports(file):
    """Dotted names that a file calls or imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


@pytest.mark.parametrize("room", sorted({file.relative_to(ROOT / "saekit").parts[0] for file in CODE}))
def test_nothing_unpickles_and_no_yaml_makes_objects(room):
    for file in CODE:
        if file.relative_to(ROOT / "saekit").parts[0] != room:
            continue
        for name, node in calls_and_imports(file):
            where = f"{file.relative_to(ROOT)}:{node.lineno}: {name}"
            assert name == "pickle.UnpicklingError" or name.split(".")[0] not in UNPICKLES, where
            assert name not in ("torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"), where
            if isinstance(node, ast.Call):
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, where
                if name.endswith(".from_pretrained"):
                    assert file.name == "lm.py", f"{where}: only there code from the model's repository is refused"


def test_the_report_page_forbids_connections():
    template = (ROOT / "saekit/views/page/templates/report.html.j2").read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', template)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert re.findall(r"\{\{ (\w+) \| safe \}\}", template) == ["plotly"]
