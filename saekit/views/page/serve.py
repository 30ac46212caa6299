"""`saekit report --serve`: gives a browser on this machine what it looks at of a report's folder (`folder`).

Addresses, below `http://127.0.0.1:PORT/`:

    /                              the page
    BUILD/plotly.js                the charts' library
    BUILD/text                     the text that features are looked at in
    BUILD/layers/3/columns/counts  an array of the fourth layer
    BUILD/layers/3/rows/1234       of one latent the rows of all arrays, one after another

No part of an address becomes part of a file's name, and nothing is ever written. Every answer but the page's needs the
folder's own word, BUILD. A web site that has its name point at this machine (DNS rebinding) is refused by the name.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from saekit._version import __version__
from saekit.errors import UserError
from saekit.views.page.folder import ONCE, PAGE, PLOTLY, TEXT, Column, layer_file, read_index

ADDRESS = "127.0.0.1"
NAMES = frozenset({ADDRESS, "localhost", "[::1]"})
"""Names of this machine that a browser may have used; the port may be a tunnel's."""
AT_ONCE = 2**20
"""Bytes."""
SECONDS = 30
"""Within which a client has to send its request and take the answer."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
HTML, SCRIPT, BYTES = "text/html; charset=utf-8", "text/javascript; charset=utf-8", "application/octet-stream"


class Stored:
    """A file of which parts are read, by several threads."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        self._lock = threading.Lock()
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        """Read some bytes; fewer where the file ends."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(length)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Span(NamedTuple):
    """A part of a file."""

    file: Stored
    offset: int
    length: int

    def pieces(self) -> Iterator[bytes]:
        """Read it, a piece at a time."""
        for start in range(0, self.length, AT_ONCE):
            yield self.file.read(self.offset + start, min(AT_ONCE, self.length - start))


class Answer(NamedTuple):
    """What an address has."""

    kind: str
    """Media type."""
    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        """Return the bytes of all spans."""
        return sum(span.length for span in self.spans)


class Report:
    """A report's folder, open for reading.

    Args:
        folder: The folder.

    Raises:
        UserError: As `read_index`.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        self._layers = index.layers
        self._page, self._plotly, self._text = (Stored(folder / name) for name in (PAGE, PLOTLY, TEXT))
        self._files = [Stored(folder / layer_file(number)) for number in range(len(index.layers))]
        self._address = re.compile(
            rf"/{re.escape(index.build)}/"
            r"(?:(?P<file>plotly\.js|text)"
            r"|layers/(?P<layer>\d{1,6})/(?:columns/(?P<column>[a-z_]{1,40})|rows/(?P<row>\d{1,10})))",
            re.ASCII,
        )

    def answer(self, path: str) -> Answer | None:
        """Return what an address has; None if there is nothing.

        Args:
            path: From the first slash on, without a query.
        """
        if path == "/":
            return _whole(HTML, self._page)
        found = self._address.fullmatch(path)
        if found is None:
            return None
        if found["file"] is not None:
            return _whole(SCRIPT, self._plotly) if found["file"] == PLOTLY else _whole(BYTES, self._text)
        layer = int(found["layer"])
        if layer >= len(self._layers):
            return None
        file, columns = self._files[layer], self._layers[layer]
        if found["column"] is not None:
            spans = [Span(file, each.offset, each.bytes) for each in columns if each.name == found["column"]]
        else:
            spans = list(_rows(file, columns, int(found["row"])))
        return Answer(BYTES, tuple(spans)) if spans else None

    def close(self) -> None:
        """Close all files."""
        for file in (self._page, self._plotly, self._text, *self._files):
            file.close()


def _whole(kind: str, file: Stored) -> Answer:
    return Answer(kind, (Span(file, 0, file.size),))


def _rows(file: Stored, columns: tuple[Column, ...], row: int) -> Iterator[Span]:
    for each in columns:
        if each.name not in ONCE and row < each.rows:
            yield Span(file, each.offset + row * each.row_bytes, each.row_bytes)


def is_local(host: str) -> bool:
    """Tell whether a Host header names this machine, whatever the port."""
    return re.sub(r":\d{1,5}$", "", host.strip(), flags=re.ASCII).lower() in NAMES


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: ReportServer
    server_version, sys_version = f"saekit/{__version__}", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        """Send what the address has."""
        answer = self._head()
        for span in () if answer is None else answer.spans:
            for piece in span.pieces():
                self.wfile.write(piece)

    def do_HEAD(self) -> None:
        """Send the same without its content."""
        self._head()

    def _head(self) -> Answer | None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_local(hosts[0]):
            self.send_error(HTTPStatus.FORBIDDEN, explain=f"This server is at http://{ADDRESS}, or localhost, only.")
            return None
        answer = self.server.report.answer(self.path.partition("?")[0])
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        return answer

    def _refuse(self) -> None:
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, explain="This server is for reading only.")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def end_headers(self) -> None:
        """Add what every answer says."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: what a browser asks for is no news."""


class ReportServer(ThreadingHTTPServer):
    """Serves a report on the loopback address; `serve_forever` answers until `shutdown`.

    Args:
        folder: The report's.
        port: 0 for any that is free.

    Raises:
        UserError: If the folder holds no whole report, or if the port is taken.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.report = Report(folder)
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            self.report.close()
            raise UserError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None

    @property
    def url(self) -> str:
        """Return where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a browser that has left; show anything else."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Close the port and all files."""
        super().server_close()
        self.report.close()


def serve(folder: Path, port: int, say: Callable[[str], None]) -> None:
    """Answer until Ctrl-C.

    Args:
        folder: The report's.
        port: 0 for any that is free.
        say: Told the address, when there are answers.

    Raises:
        UserError: As `ReportServer`.
    """
    with ReportServer(folder, port) as server, suppress(KeyboardInterrupt):
        say(server.url)
        server.serve_forever()
