"""Readers of every file format, fed with damaged files: one sentence, or what the file says; nothing else.

Without checksums a damaged file can be another good file. In a checkpoint any change is found, or changes nothing.
`SAEKIT_EXAMPLES=25000 pytest tests/test_damaged_files.py` tries more of them.
"""

import json
import struct
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import saekit
from saekit import RunConfig, Sae, UserError
from saekit.analysis.inspect import inspect_path, inspection_to_json
from saekit.config.flat import read_yaml
from saekit.report import Reporters
from saekit.runs.index import OWN
from saekit.runs.recovery import find_checkpoint
from saekit.sae.selection.batchtopk import BatchTopK
from tests.damage import damaged, damaged_bytes, no_hang

DAMAGE = st.integers(0, 2**64).map(Random)
D, M, K = 8, 24, 3
TRANSCODER = {"transcode": True, "skip_connection": True, "d_out": 5, "max_norm_out": 4.5}
TRANSCODER |= {"reads": {"layers.1.mlp:in": 8}, "writes": {"layers.1.mlp": 5}}
CROSSCODER = {"reads": {"layers.0": 2, "layers.1": 6}, "writes": {"layers.0": 2, "layers.1": 6}}
SAME = {"reads": {"layers.1.mlp": 8}, "writes": {"layers.1.mlp": 8}}
KINDS = {
    "topk": {},
    "batchtopk": {"selection": BatchTopK(K, M, 0.25)},
    "saelens": {},
    "transcoder": TRANSCODER,
    "sparsify": {"transcode": True, "skip_connection": True, "selection": "groupmax"},
    "crosscoder": CROSSCODER,
}
X = torch.randn(5, D, generator=torch.Generator().manual_seed(0))


def outcome(read):
    """What a reader gives, or None if it refuses in one sentence."""
    with no_hang():
        try:
            return read()
        except UserError as error:
            said = str(error)
    assert said.strip()
    assert "\n" not in said
    return None


def make_sae(kind):
    sae = Sae(D, M, K, max_norm=9.5, **KINDS[kind])
    with torch.no_grad():
        sae.b_enc.normal_()
        if sae.W_skip is not None:
            sae.W_skip.normal_()
    return sae


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind != "sparsify"])
def alone(request, tmp_path_factory):
    """A coder's folder outside of a checkpoint, its files' content, and the name of its weights."""
    folder = tmp_path_factory.mktemp(request.param) / "layers.1"
    saekit.save(make_sae(request.param), folder, "saelens" if request.param == "saelens" else "sparsify")
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    return folder, content, next(name for name in content if name.endswith(".safetensors"))


def put(folder, content, name, new):
    for each, old in content.items():
        (folder / each).write_bytes(new if each == name else old)


def try_out(folder, config_file="cfg.json"):
    """Open a folder by all its readers, and see that what comes out is what the files say."""
    sae = outcome(lambda: saekit.load(folder))
    if sae is not None:
        config = json.loads((folder / config_file).read_bytes())
        assert (sae.d_in, sae.k) == (config["d_in"], config["k"])
        assert sae.num_latents == (config.get("num_latents") or config.get("d_sae") or D * config["expansion_factor"])
        assert sae.activation == ("topk" if "architecture" in config else config.get("activation", "topk"))
        assert (sae.reads, sae.writes) == (config.get("reads", {}), config.get("writes", {}))
        assert sae.transcode is config.get("transcode", False)
        assert (sae.W_skip is not None) is config.get("skip_connection", False)
        assert sae.d_out == (config.get("d_out") or config["d_in"])
        assert sae.max_norm_out == config.get("max_norm_out")
        x = X.to(sae.dtype)
        code = sae.encode(x)
        assert code.indices.shape == (5, sae.max_active)
        assert sae.decode(*code, x).shape == (5, sae.d_out)
    if (folder / "sae.safetensors").exists():
        inspection = outcome(lambda: inspect_path(folder))
        if inspection is not None:
            json.dumps(inspection_to_json(inspection), allow_nan=False)


@given(random=DAMAGE)
def test_cfg_json(alone, random):
    folder, content, _ = alone
    put(folder, content, "cfg.json", damaged(content["cfg.json"], random))
    try_out(folder)


def damaged_header(content, random):
    """Another header of a safetensors file, as often with another length of it; the tensors are the same."""
    (size,) = struct.unpack("<Q", content[:8])
    header = damaged(content[8 : 8 + size], random)
    lengths = [len(header), len(header), random.randint(0, 2 * size), random.choice([2**31, 2**63, 2**64 - 1])]
    return struct.pack("<Q", random.choice(lengths)) + header + content[8 + size :]


@given(random=DAMAGE)
def test_safetensors(alone, random):
    folder, content, weights = alone
    put(folder, content, weights, random.choice([damaged_header, damaged_bytes])(content[weights], random))
    try_out(folder)


@pytest.fixture(scope="module")
def checkpoint(model_dir, text_file, tmp_path_factory):
    """A real checkpoint, its files' content, and what its readers make of it."""
    options = {"layers": [1], "ctx_len": 32, "max_tokens": 512, "batch_size": 4, "num_latents": 32, "k": 4}
    folder = saekit.train(
        model_dir, str(text_file), save_dir=tmp_path_factory.mktemp("runs"), reporter=Reporters(), **options
    )
    content = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return folder, content, {name: read(folder) for name, read in READERS.items()}


def weights(folder):
    sae = saekit.load(folder, "layers.1")
    return {name: each.tolist() for name, each in sae.state_dict().items()}, sae.extra_repr(), sae.trained_on


READERS = {
    "load": weights,
    "inspect": lambda folder: json.dumps(inspection_to_json(inspect_path(folder, 1))),
    "resume": lambda folder: find_checkpoint(folder).index,
}
FILES = ["checkpoint.json", "layers.1/cfg.json", "layers.1/sae.safetensors", "layers.1/saekit.json"]
INDICES = [b'{"serial": 1e999}', b'{"files": {}, "format": "2\\n3"}']


@pytest.mark.parametrize("name", FILES)
@given(random=DAMAGE)
def test_a_checkpoint_is_what_it_was_or_is_refused(checkpoint, name, random):
    folder, content, expected = checkpoint
    put(folder, content, name, damaged(content[name], random))
    for reader, read in READERS.items():
        found = outcome(lambda read=read: read(folder))
        assert found is None or found == expected[reader] or by_development_version(folder)
    if not same_content(folder / name, content[name]) and not by_development_version(folder):
        assert outcome(lambda: weights(folder)) is None


def by_development_version(folder):
    """Whether the index has lost its checksum: then it cannot be told from one that never had it."""
    index = parsed((folder / "checkpoint.json").read_bytes())
    return isinstance(index, dict) and OWN not in index


def same_content(file, content):
    """Whether the file is what it was; the spelling of an index does not matter."""
    if file.name != "checkpoint.json":
        return file.read_bytes() == content
    return parsed(file.read_bytes()) == json.loads(content)


def parsed(content):
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def without(*keys):
    return lambda config: {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("sparsify", without("skip_connection"), "has a tensor 'W_skip', but the coder described by cfg.json"),
        ("sparsify", without("transcode"), "describes an autoencoder with a skip connection"),
        ("sparsify", lambda config: {**config, "d_out": 5}, r"W_dec has shape \[24, 8\], but cfg.json says \[24, 5\]"),
        ("transcoder", without("transcode", "skip_connection"), "an autoencoder with d_out"),
        ("transcoder", without("transcode", "skip_connection", "d_out"), "an autoencoder with max_norm_out"),
        ("transcoder", lambda config: {**config, "d_out": 8, **SAME},
         "describes a transcoder that reads and writes the same hookpoints"),
        ("crosscoder", without("writes"), "only one of 'reads' and 'writes'"),
        ("crosscoder", lambda config: {**config, "writes": {"layers.1": 6, "layers.0": 2}}, "different hookpoints"),
        ("crosscoder", lambda config: {**config, "reads": {"layers.0": 8.0}}, "must map hookpoints to their widths"),
        ("crosscoder", lambda config: {**config, "reads": {"layers.0": 7}}, "the widths of 'reads' add up to 7, not 8"),
    ],
)  # fmt: skip
def test_a_kind_of_coder_is_not_taken_for_another(tmp_path, kind, change, says):
    saekit.save(make_sae(kind), tmp_path)
    file = tmp_path / "cfg.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=says):
        saekit.load(tmp_path)


def test_a_limit_of_zero_is_a_limit(tmp_path):
    saekit.save(Sae(D, M, K, transcode=True, max_norm=0, max_norm_out=0), tmp_path)
    assert (saekit.load(tmp_path).max_norm, saekit.load(tmp_path).max_norm_out) == (0, 0)


def test_a_name_of_two_lines_in_a_header_is_said_in_one(alone):
    """In the words of the library that reads it."""
    folder, content, weights = alone
    put(folder, content, weights, content[weights].replace(b'"F32"', b'"F\\n"', 1))
    try_out(folder)
    put(folder, content, None, b"")


@pytest.mark.parametrize("index", INDICES)
def test_numbers_of_an_index_that_are_none(tmp_path, index):
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001/checkpoint.json").write_bytes(index)
    assert outcome(lambda: find_checkpoint(tmp_path)) is None


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory):
    values = {"model": "gpt2", "dataset": "text.jsonl", "layers": "0-10:2", "matryoshka": "0.25,1", "lr": 1e-3, "k": 16}
    values |= {"data_args": "name=en,streaming=true", "max_examples": 1000, "exclude_tokens": "0,50256"}
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    RunConfig.from_flat(values).to_yaml(file)
    assert RunConfig.from_yaml(file).train.sae.k == 16
    return file, file.read_bytes()


@given(random=DAMAGE)
def test_run_yaml(run_yaml, random):
    file, content = run_yaml
    file.write_bytes(damaged_bytes(content, random))
    assert isinstance(outcome(lambda: read_yaml(file)), (dict, type(None)))
    config = outcome(lambda: RunConfig.from_yaml(file))
    if config is not None:
        values = config.to_flat()
        assert RunConfig.from_flat(yaml.safe_load(yaml.safe_dump(values))).to_flat() == values


def test_the_examples_are_no_accident(alone, checkpoint):
    """Undamaged files pass all of this."""
    folder, content, _ = alone
    put(folder, content, None, b"")
    try_out(folder)
    assert saekit.load(folder).k == K
    put(*checkpoint[:2], None, b"")
    assert all(read(checkpoint[0]) == checkpoint[2][name] for name, read in READERS.items())
    assert Path(checkpoint[0]).name.startswith("step_")
