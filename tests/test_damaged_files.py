"""Readers of every file format, fed with damaged files: one sentence, or what the file says; nothing else.

Without checksums a damaged file can be another good file. In a checkpoint any change is found, or changes nothing.
`SAEKIT_EXAMPLES=25000 pytest tests/test_damaged_files.py` tries more of them.
"""

import json
import struct
from pathlib import Path

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
from saekit.runs.recovery import find_checkpoint
from saekit.sae.selection.batchtopk import BatchTopK
from tests.damage import changed, changed_bytes, no_hang

D, M, K = 8, 24, 3
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
    sae = Sae(D, M, K, selection=BatchTopK(K, M, 0.25) if kind == "batchtopk" else kind, max_norm=9.5)
    with torch.no_grad():
        sae.b_enc.normal_()
    return sae


@pytest.fixture(scope="module", params=["topk", "batchtopk", "saelens"])
def alone(request, tmp_path_factory):
    """An SAE's folder outside of a checkpoint, its files' content, and the name of its weights."""
    folder = tmp_path_factory.mktemp(request.param) / "layers.1"
    saekit.save(make_sae("topk" if request.param == "saelens" else request.param), folder, _format(request.param))
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    return folder, content, next(name for name in content if name.endswith(".safetensors"))


def _format(kind):
    return "saelens" if kind == "saelens" else "sparsify"


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
        code = sae.encode(X.to(sae.dtype))
        assert code.indices.shape == (5, sae.max_active)
        assert sae.decode(*code).shape == X.shape
    if (folder / "sae.safetensors").exists():
        inspection = outcome(lambda: inspect_path(folder))
        if inspection is not None:
            json.dumps(inspection_to_json(inspection), allow_nan=False)


@given(data=st.data())
def test_cfg_json(alone, data):
    folder, content, _ = alone
    put(folder, content, "cfg.json", data.draw(changed(content["cfg.json"])))
    try_out(folder)


def changed_header(content):
    """Return a strategy of safetensors files with another header, or another length of it; the tensors are the same."""
    (size,) = struct.unpack("<Q", content[:8])
    lengths = st.one_of(st.none(), st.none(), st.integers(0, 2 * size), st.sampled_from([2**31, 2**63, 2**64 - 1]))

    def put_together(header, length):
        return struct.pack("<Q", len(header) if length is None else length) + header + content[8 + size :]

    return st.builds(put_together, changed(content[8 : 8 + size]), lengths)


@given(data=st.data())
def test_safetensors(alone, data):
    folder, content, weights = alone
    damaged = data.draw(st.one_of(changed_header(content[weights]), changed_bytes(content[weights])))
    put(folder, content, weights, damaged)
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
FILES = ["layers.1/cfg.json", "layers.1/sae.safetensors", "layers.1/saekit.json"]


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_a_checkpoint_is_what_it_was_or_is_refused(checkpoint, name, data):
    folder, content, expected = checkpoint
    put(folder, content, name, data.draw(changed(content[name])))
    for reader, read in READERS.items():
        found = outcome(lambda read=read: read(folder))
        assert found is None or found == expected[reader]
    if (folder / name).read_bytes() != content[name]:
        assert outcome(lambda: weights(folder)) is None


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory):
    values = {"model": "gpt2", "dataset": "text.jsonl", "layers": "0-10:2", "matryoshka": "0.25,1", "lr": 1e-3, "k": 16}
    values |= {"data_args": "name=en,streaming=true", "max_examples": 1000, "exclude_tokens": "0,50256"}
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    RunConfig.from_flat(values).to_yaml(file)
    assert RunConfig.from_yaml(file).train.sae.k == 16
    return file, file.read_bytes()


@given(data=st.data())
def test_run_yaml(run_yaml, data):
    file, content = run_yaml
    file.write_bytes(data.draw(changed_bytes(content)))
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
