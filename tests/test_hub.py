"""Which names are paths; and a hub that does not answer, for which nobody waits longer than seconds."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

import saekit
from saekit import UserError, hub
from saekit.activations import load_tokenizer, model_shape
from saekit.config import DataConfig, ModelConfig
from saekit.data import load_sequences

PATIENCE = 5
"""Seconds in which a command that needs a hub that does not answer has to end."""


@pytest.mark.parametrize(
    "name",
    [
        *("m2/config.json", "d/*.foo", "-", "", "./m", "/m", "~/m", "~nobody/m", "a/b/c", "a//b", "a\\b", "a b"),
        *("data.bin", "owner/x.jsonl.gz", "model.safetensors", "x?", "[a]", "..", "a..b", "a--b", "x.git", "é"),
        *("a\0b", "n" * 300),
    ],
)
def test_paths(name):
    assert hub.is_path(name)


@pytest.mark.parametrize(
    "name", ["gpt2", "EleutherAI/pythia-160m", "Qwen/Qwen2.5-0.5B", "org/model-v1.0", "wikitext", "a/b_c.d", "json"]
)
def test_repositories(name):
    assert not hub.is_path(name)


def test_what_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert hub.is_path("gpt2")


def test_a_similar_name_that_is_there_is_named(tmp_path):
    (tmp_path / "pile.jsonl").touch()
    with pytest.raises(UserError, match=r"there is no such file or folder \(did you mean .*pile\.jsonl\?\)"):
        hub.check_data_name(str(tmp_path / "plie.jsonl"))


@pytest.fixture
def online(monkeypatch):
    """The libraries may ask the hub, at the address that this function is given."""
    import datasets

    def at(port):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        here = f"http://127.0.0.1:{port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", here)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", here)

    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub, "ASK", 0.5)
    return at


@pytest.fixture
def closed_port():
    """A port at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silent_port():
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield listening.getsockname()[1]


@pytest.fixture
def hub_without_repositories():
    """The port of a server that says 404 to everything, and the list of what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
def test_a_hub_that_does_not_answer(request, online, port):
    online(request.getfixturevalue(port))
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"model 'owner/nosuch'.*cache.*the hub at http.* cannot be reached"):
        model_shape(ModelConfig("owner/nosuch"))
    with pytest.raises(UserError, match=r"data set 'owner/nosuch'.*cache.*the hub at http.* cannot be reached"):
        load_sequences(DataConfig("owner/nosuch"), None, 8)
    with pytest.raises(UserError, match=r"owner/nosuch: .*cache.*the hub at http.* cannot be reached"):
        saekit.load("owner/nosuch", "layers.0")
    assert time.monotonic() - begun < PATIENCE
    assert not constants.HF_HUB_OFFLINE  # the next call asks again


def test_a_hub_that_answers_is_asked(online, hub_without_repositories):
    port, asked = hub_without_repositories
    online(port)
    with pytest.raises(UserError, match=r"model 'owner/nosuch'.*neither on this machine nor on the hub"):
        model_shape(ModelConfig("owner/nosuch"))
    assert any("owner/nosuch" in path for path in asked)
    assert hub.unreachable() is None


def test_paths_are_not_looked_up(online, hub_without_repositories, model_dir, text_file, tmp_path):
    """Neither what is there nor what is not; datasets counts downloads of local files, too."""
    port, asked = hub_without_repositories
    online(port)
    cfg = ModelConfig(str(model_dir))
    model_shape(cfg)
    load_sequences(DataConfig(str(text_file)), load_tokenizer(cfg), 8)
    shutil.copy(model_dir / "config.json", tmp_path)  # without a tokenizer, and with no weights
    for name in ("m2/config.json", "-", "./nosuch", str(tmp_path / "nosuch"), "x.safetensors"):
        with pytest.raises(UserError, match="model"):
            model_shape(ModelConfig(name))
    for name in ("d/*.foo", "-", "nosuch.jsonl", "owner/nosuch.parquet", str(tmp_path)):
        with pytest.raises(UserError, match="data set"):
            load_sequences(DataConfig(name), None, 8)
    assert asked == []


def test_the_cache_is_used_and_said_so(online, closed_port, model_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(model_dir, repository / "snapshots" / "abc")
    online(closed_port)
    assert model_shape(ModelConfig("owner/cached")).num_layers == 3
    assert "using owner/cached from the cache on this machine: the hub at" in caplog.text
    hub.check_model_name("owner/cached")


def test_the_command_line_is_as_quick(tmp_path, closed_port, silent_port):
    """From the shell, where libraries have to be loaded: the hub is asked before that."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    took = []
    for port in (closed_port, silent_port):
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "saekit", "train", "owner/nosuch", "owner/data"]
        begun = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
        took.append(time.monotonic() - begun)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"the hub at http://127.0.0.1:{port} cannot be reached" in done.stderr
    assert "no answer within 2.5 s; set HF_HUB_ETAG_TIMEOUT to wait longer" in done.stderr
    assert took[1] - took[0] < PATIENCE - 1  # how long Python takes to start is the machine's
