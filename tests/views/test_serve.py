"""What `saekit report --serve` gives, and what it refuses."""

import http.client
import json
import re
import signal
import socket
import subprocess

import numpy as np
import pytest

from saekit.errors import UserError
from saekit.views.page.folder import (
    INDEX,
    ONCE,
    PAGE,
    TEXT,
    default_folder,
    fits,
    identity,
    layer_file,
    read_index,
)
from saekit.views.page.serve import Report, ReportServer, is_local
from tests.views.test_page import element, unpack


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={"Host": "localhost", **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def column(server, folder, layer, name):
    index = read_index(folder)
    (found,) = (each for each in index.layers[layer] if each.name == name)
    _, content = ask(server, f"/{index.build}/layers/{layer}/columns/{name}")
    return np.frombuffer(content, np.dtype(found.type)).reshape(found.rows, -1)


def test_its_numbers_are_those_of_the_one_file(server, folder, made):
    page = made[0].read_text("utf-8")
    words, served_words = (
        json.loads(element(each, "data"))["vocabulary"] for each in (page, (folder / PAGE).read_text("utf-8"))
    )
    index = read_index(folder)
    _, content = ask(server, f"/{index.build}/text")
    text = np.frombuffer(content, np.dtype(index.text.type)).reshape(index.text.rows, -1)
    shown = unpack(element(page, "text"))["ids"]
    assert [served_words[token] for token in text.flat] == [words[token] for token in shown.flat]
    for layer in range(len(index.layers)):
        wanted = unpack(element(page, f"layer-{layer}"))
        assert {each.name for each in index.layers[layer]} == set(wanted)
        for name in ("counts", "places", "histogram", "shades", "cosines", "silent"):
            found = column(server, folder, layer, name)
            assert np.array_equal(found.reshape(wanted[name].shape), wanted[name]), name


def test_a_row_has_what_the_columns_have_of_one_latent(server, folder):
    index = read_index(folder)
    _, content = ask(server, f"/{index.build}/layers/1/rows/17")
    start = 0
    for each in index.layers[1]:
        if each.name in ONCE:
            continue
        found = np.frombuffer(content, np.dtype(each.type), each.width, start)
        wanted = column(server, folder, 1, each.name)[17]
        assert found.tobytes() == wanted.tobytes(), each.name
        start += each.row_bytes
    assert start == len(content)


def test_only_what_is_looked_at_is_read(folder, monkeypatch):
    report, read = Report(folder), []
    build = read_index(folder).build
    monkeypatch.setattr(
        "saekit.views.page.serve.Stored.read", lambda self, offset, length: read.append(length) or b"\0" * length
    )
    answer = report.answer(f"/{build}/layers/0/rows/3")
    assert sum(len(piece) for span in answer.spans for piece in span.pieces()) == answer.length == sum(read)
    assert answer.length < (folder / layer_file(0)).stat().st_size / 200
    report.close()


@pytest.mark.parametrize("host", ["127.0.0.1:8642", "localhost", "LOCALHOST:9000", "[::1]:80"])
def test_names_of_this_machine(server, host):
    assert is_local(host)
    assert ask(server, "/", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8642", "localhost.evil.example", "127.0.0.1.evil.example:80", "0.0.0.0", ""]
)
def test_other_names_are_refused(server, host):
    answer, content = ask(server, "/", Host=host)
    assert answer.status == 403
    assert b"localhost" in content


def raw(server, request):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request)
        return connection.makefile("rb").read()


def test_two_names_or_none_are_refused(server):
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        assert b" 403 " in raw(server, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n").splitlines()[0]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "WRITE"])
def test_nothing_is_written(server, folder, method):
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert ask(server, "/", method)[0].status in (405, 501)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "path",
    [
        "/index.json",
        "/page.html",
        "/../eval.json",
        "/BUILD/../eval.json",
        "/BUILD/..%2feval.json",
        "/BUILD/layers/0/columns/../../../../eval.json",
        "/BUILD/layers/0/columns/nothing",
        "/BUILD/layers/2/columns/counts",
        "/BUILD/layers/-1/columns/counts",
        "/BUILD/layers/0/rows/256",
        "/BUILD/layers/0/rows/-1",
        "/BUILD/layers/0/rows/9999999999",
        "/BUILD/layers/٣/rows/0",
        "/0/text",
        "//etc/passwd",
        "http://evil.example/",
    ],
)
def test_nothing_else_is_there(server, folder, path):
    path = path.replace("BUILD", read_index(folder).build).encode()
    head = raw(server, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n").splitlines()[0]
    assert head.split()[1] in (b"404", b"400"), head


def test_head_and_what_a_browser_is_told(server, folder):
    answer, content = ask(server, "/?from=somewhere")
    assert content == (folder / PAGE).read_bytes()
    for name in ("Content-Security-Policy", "Cross-Origin-Resource-Policy", "X-Content-Type-Options", "Cache-Control"):
        assert answer.headers[name]
    assert "'self'" in answer.headers["Content-Security-Policy"]
    head, nothing = ask(server, "/", "HEAD")
    assert nothing == b""
    assert head.headers["Content-Length"] == str(len(content))


def test_it_listens_on_this_machine_only(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken(server, folder):
    with pytest.raises(UserError, match=rf"port {server.server_port} cannot be used .*--port"):
        ReportServer(folder, server.server_port)


def test_a_browser_that_leaves_is_no_error(server, folder, capfd):
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        build = read_index(folder).build
        connection.sendall(f"GET /{build}/plotly.js HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not closed
    assert ask(server, "/")[0].status == 200
    assert capfd.readouterr().err == ""


def test_a_report_fits_one_checkpoint_and_its_options(folder, demo_run, tmp_path, monkeypatch):
    index = read_index(folder)
    assert index.asked["max_tokens"] == 3000
    monkeypatch.setattr("saekit.views.page.folder.identity", lambda path: index.identity)
    assert fits(folder, demo_run, index.asked)
    assert not fits(folder, demo_run, {**index.asked, "latents": 10})
    assert not fits(tmp_path, demo_run, index.asked)
    monkeypatch.setattr("saekit.views.page.folder.identity", lambda path: "another")
    assert not fits(folder, demo_run, index.asked)


def test_what_a_report_is_of(tmp_path):
    step = tmp_path / "step_00000001"
    step.mkdir()
    seen = []
    files = [("sae.safetensors", "1"), ("sae.safetensors", "12"), ("checkpoint.json", "1"), ("eval.json", "1")]
    for name, content in files:
        (step / name).write_text(content)
        seen.append(identity(step))
        assert identity(step) == seen[-1]
    assert len(set(seen)) == len(seen)
    (tmp_path / "latest").symlink_to(step.name)
    assert identity(tmp_path) == seen[-1]
    assert default_folder(tmp_path) == step / "report" == default_folder(step)


def test_a_reports_folder_is_served_without_its_checkpoint(folder, saekit, monkeypatch):
    served = []
    monkeypatch.setattr("saekit.views.page.serve.serve", lambda folder, port, say: served.append((folder, port)))
    assert saekit("report", folder, "--serve", "--port", 0).code == 0
    assert served == [(folder, 0)]


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_damaged_folders(folder, tmp_path):
    for number, (name, content) in enumerate([(TEXT, b""), (layer_file(1), b"short"), (INDEX, b"{}"), (INDEX, b"[")]):
        broken = copied(folder, tmp_path / str(number))
        (broken / name).write_bytes(content)
        with pytest.raises(UserError, match="make it again"):
            read_index(broken)
    newer = copied(folder, tmp_path / "newer")
    (newer / INDEX).write_text((newer / INDEX).read_text().replace('"saekit_report": 1', '"saekit_report": 2'))
    with pytest.raises(UserError, match="another version"):
        read_index(newer)


def test_what_is_no_report_is_not_replaced(demo_run, saekit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    result = saekit("report", demo_run, "--prepare", "-o", tmp_path / "mine")
    assert result.code == 2
    assert "is no report" in result.err
    assert (tmp_path / "mine" / "file").read_text() == "kept"
    assert "does not exist" in saekit("report", tmp_path / "nowhere", "--prepare").err


@pytest.mark.slow
def test_the_command_makes_what_is_missing_serves_it_and_ends_on_ctrl_c(demo_run, folder, forked, tmp_path):
    command = [forked.python, "-m", "saekit", "report", demo_run, "--max-tokens", "3000", "--latents", "20"]
    command += ["-o", tmp_path / "few", "--serve", "--port", "0"]
    with subprocess.Popen(
        command, env=forked.environment(PYTHONUNBUFFERED=1), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        wrote, serving_at = process.stdout.readline(), process.stdout.readline()
        assert "saekit report --serve" in wrote
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C", serving_at)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "Stopped\n"
        assert process.wait(timeout=20) == 0
    assert read_index(tmp_path / "few").layers[0][0].rows == 10
