"""Whatever is typed: exit 0 with the run that was asked for, or 2 with one line. SAEKIT_EXAMPLES says how much."""

import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from saekit.cli.app import main
from saekit.cli.train import _show
from saekit.config import RunConfig
from saekit.config.flat import as_yaml
from saekit.config.options import options_of
from saekit.config.run import PARTS
from tests.cli.conftest import build_once

OPTIONS = {option.name: option for part in PARTS for option in options_of(part)}
READS_FILES = ("plugin", "resume")
"""Options that lead to other files before the configuration is complete."""


class Result(NamedTuple):
    code: int
    out: str
    err: str
    configs: list[RunConfig]
    """Of the runs that it came to."""


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """Run the command line up to the complete configuration, in an empty folder."""
    configs = []
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("empty") / "below"
        folder.mkdir()
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        patch.setattr("saekit.cli.train._show", lambda cfg, *_: configs.append(cfg))
        build_once(patch)
        yield lambda *arguments: run(arguments, configs)


def run(arguments, configs=()):
    """Call `main` with streams like those of a process."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", how, write_through=True) for how in ("strict", "backslashreplace")
    )
    before, code = list(configs), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["saekit", *arguments])
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
    texts = (stream.buffer.getvalue().decode("utf-8") for stream in (out, err))
    return Result(code, *texts, list(configs)[len(before) :])


def assert_well(result):
    """Done, or one line that says what was wrong."""
    assert result.code in (0, 2), result.err
    assert "Traceback" not in result.err
    if result.code == 2:
        lines = result.err.splitlines()
        assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
        assert result.configs == []


TEXT = st.text(st.characters(exclude_characters="\0/~", exclude_categories=["Cs"]), max_size=12)
"""What can be typed, NUL cannot, without paths to what is on this machine."""
NAMES = st.one_of(
    TEXT, st.sampled_from(["~nobody/x", "n" * 300, "-", "..", "latest", "auto", "a/b", "[red]x[/red]", "\udcff"])
)
NUMBERS = st.one_of(
    st.integers(-2, 300).map(str),
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(["1_000", " 7 ", "7.0", "1e3", "0x10", "+5", "٣", "1e400", "9" * 5000, "", "true"]),
)
LISTS = st.one_of(
    st.lists(st.integers(0, 40).map(str), min_size=1, max_size=4).map(",".join),
    st.lists(st.sampled_from(["0-3", "4-20:3", "7", "2-1", "0-9999999999", "-1", "0.25", "1", ""]), max_size=3).map(
        ",".join
    ),
    st.lists(st.integers(0, 40).map(str), max_size=3).map(" ".join),
)
PAIRS = st.lists(
    st.tuples(
        st.sampled_from(["name", "streaming", "dtype", "a b", ""]),
        st.sampled_from(["en", "true", "3", "1.5", "[", "2020-01-01"]),
    ),
    max_size=3,
).map(lambda pairs: ",".join(f"{name}={value}" for name, value in pairs))


def values_of(option):
    """Values that are mostly of the option's kind."""
    if option.type is bool:
        return st.sampled_from(["", "", "", "True", "false"])
    if get_origin(option.type) is Literal:
        return st.one_of(st.sampled_from(get_args(option.type)), TEXT)
    if option.type in (int, float):
        return NUMBERS
    if get_origin(option.type) is tuple:
        return LISTS
    return PAIRS if get_origin(option.type) is dict else NAMES


@st.composite
def command_lines(draw):
    """Options and their values by name, and how they are typed."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS.keys() - set(READS_FILES))), unique=True, max_size=5))
    said, arguments = {}, []
    for name in names:
        value = draw(values_of(OPTIONS[name]))
        flag = f"--{name if draw(st.booleans()) else name.replace('_', '-')}"
        said[name] = value
        if OPTIONS[name].type is bool and not value:
            off = draw(st.booleans())
            said[name] = str(not off)
            arguments.append(f"--no-{name}" if off else flag)
        else:
            arguments += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    return said, arguments


def assert_means(name: str, said: str, found: Any) -> None:
    """Check that a value is what was said, by other code than that under test."""
    option = OPTIONS[name]
    if option.type is bool:
        assert found is (said.lower() == "true")
    elif option.type is int:
        assert int(Decimal(said.strip().replace("_", ""))) == found
    elif option.type is float:
        assert math.isclose(Decimal(said.strip().replace("_", "")), found, rel_tol=1e-15)
    elif get_origin(option.type) is dict:
        pairs = [pair.split("=", 1) for pair in said.split(",") if pair]
        assert {key.strip(): value if "-" in value else yaml.safe_load(value) for key, value in pairs} == found
    elif get_origin(option.type) is tuple:
        words = get_args(option.type)[0] is str
        assert list(found) == (said.replace(",", " ").split() if words else numbers_in(said))
    elif name == "hf_token":
        assert found.get_secret_value() == said
    else:
        assert (Path(said) if option.type is Path else said) == found


def numbers_in(said):
    """Each number and range, one after the other."""
    numbers = []
    for part in said.replace(",", " ").split():
        span, _, stride = part.partition(":")
        first, dash, last = span.partition("-")
        numbers += range(int(first), int(last) + 1, int(stride or 1)) if dash else [json.loads(first)]
    return numbers


def value_in(cfg, name):
    """An option's value in a whole configuration."""
    for part in (cfg.train.sae, cfg.model, cfg.data, cfg.train):
        if hasattr(part, name):
            return getattr(part, name)
    raise AssertionError(name)


@given(command_lines())
@example(({"layers": "1 2"}, ["--layers", "1 2"]))
@example(({"layer_map": "\x85"}, ["--layer-map", "\x85"]))  # a line break of Unicode's
def test_options_of_train(typed, line):
    said, arguments = line
    result = typed("train", "owner/model", "owner/data", *arguments, "--dry-run")
    assert_well(result)
    if result.code == 0:
        (cfg,) = result.configs
        for name, value in said.items():
            assert_means(name, value, value_in(cfg, name))
        secret = {} if cfg.model.hf_token is None else {"hf_token": cfg.model.hf_token.get_secret_value()}
        again = yaml.safe_load(as_yaml(cfg.to_flat()))
        assert RunConfig.from_flat({**again, **secret}) == cfg


WORDS = st.one_of(
    st.sampled_from([f"--{name}" for name in sorted(OPTIONS.keys() - set(READS_FILES))]),
    st.sampled_from(
        [
            *("--dry-run", "--launch", "--num-processes", "--gpus", "--json", "--layer", "--max-tokens=3", "--seed"),
            *("--", "-x", "--finetune", "--resume", "--config", "--plugin", "--model", "--yes", "--latents", "--help"),
        ]
    ),
    NAMES,
    NUMBERS,
)
"""Of command lines that make no sense."""


@given(
    st.sampled_from(["train", "plan", "inspect", "eval", "report", "", "config --yes", "trian"]),
    st.lists(WORDS, max_size=5),
)
def test_words_in_any_order(typed, command, words):
    result = typed(*command.split(), *words, *(["--dry-run"] if command in ("train", "") else []))
    assert_well(result)
    if result.code == 0 and command not in ("train", ""):
        assert "--help" in words or words == []


YAML_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(0, 64), st.floats(), TEXT, NUMBERS, st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=4,
)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(OPTIONS.keys() - set(READS_FILES))), TEXT), YAML_VALUES, max_size=4
    )
)
def test_values_in_yaml(typed, values):
    file = Path("run.yaml")
    try:
        file.write_text(yaml.safe_dump({"model": "owner/model", "dataset": "owner/data", **values}, allow_unicode=True))
    except UnicodeEncodeError:
        assume(False)
    result = typed("train", "--config", str(file), "--dry-run")
    file.unlink()
    assert_well(result)
    if result.code == 0:
        (cfg,) = result.configs
        for name, value in values.items():
            found = value_in(cfg, name)
            if value is None or name == "hf_token":
                continue
            if isinstance(value, bool):
                assert found is value
            elif isinstance(value, (int, float)) and not isinstance(found, tuple):
                assert float(found) == float(value)
            elif OPTIONS[name].type is str:
                assert found == value


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Run the command line, plan included, in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        patch.setenv("COLUMNS", "200")
        build_once(patch)
        patch.setattr("saekit.cli.train._show", _show)  # again, after `typed`
        yield lambda *arguments: run([str(each) for each in arguments])


SMALL = st.integers(1, 64).map(str)
ANY = st.one_of(SMALL, st.integers(1, 10**30).map(str))


@settings(max_examples=max(10, settings.default.max_examples // 20))
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(["batch_size", "grad_acc_steps", "ctx_len"], SMALL),  # a plan runs each block of tokens
            **dict.fromkeys(["num_latents", "k", "micro_acc_steps", "max_tokens"], ANY),
            "layers": st.sampled_from(["0", "0-2", "2,2", "3"]),
            "activation": st.sampled_from(["topk", "batchtopk", "groupmax"]),
            "optimizer": st.sampled_from(["adam", "adam8bit", "signum", "muon"]),
            "matryoshka": st.sampled_from(["0.5,1", "0.25,0.5,1"]),
            "auxk_alpha": st.sampled_from(["0", "0.03125"]),
            "placement": st.sampled_from(["auto", "ddp", "single", "zero3", "layer-map"]),
        },
    )
)
def test_plans_of_any_size(planned, model_dir, said):
    arguments = [part for name, value in said.items() for part in (f"--{name}", value)]
    result = planned("train", model_dir, "owner/data", *arguments, "--dry-run")
    assert_well(result)
    if result.code == 0:
        shown = yaml.safe_load(result.out.partition("\n\n")[0])
        for name, value in said.items():
            if value.isdecimal() and name != "layers":
                assert shown[name] == int(value)
