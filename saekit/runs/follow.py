"""What a run's folder says while another process, perhaps of another machine, writes in it. It is only read.

Nothing tells a reader on a shared file system that a file has changed, so these look again and again.
"""

from __future__ import annotations

import errno
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from saekit.errors import UserError
from saekit.report.live_table import TREND_REPORTS
from saekit.runs.layout import LOCK_FILE
from saekit.runs.lease import Writer, read_lease, renewed_at
from saekit.runs.metrics import EVALUATION, START, parse

KIND = re.compile(rb'\{"kind": "(\w+)"')


@dataclass
class News:
    """The new records of a metrics file."""

    replaced: bool = False
    """Whether it is another file than before, or shorter: what was read before is void."""
    start: dict[str, Any] | None = None
    """The record of the newest start."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """What came after that: the newest records, as many as a trend shows, and the newest evaluation."""


class MetricsTail:
    """Reads what is appended to a metrics file, and notices if the file is replaced or cut.

    Args:
        path: The file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read, self._last = 0, b""
        """Bytes that were read, and the last whole line of them, by which the file is known again."""
        self._bad = b""

    def news(self) -> News:
        """Return what is new. A last line that is not whole yet is left for the next time.

        Raises:
            UserError: If the file cannot be read, or a line of it is not a record.
        """
        before = self._read, self._last
        try:
            with self.path.open("rb", buffering=1 << 20) as file:
                replaced = not self._knows(file)
                if replaced:
                    self._read, self._last = 0, b""
                file.seek(self._read)
                start, lines = self._whole_lines(file)
        except FileNotFoundError:
            self._read, self._last = 0, b""
            return News(replaced=before[0] > 0)
        except OSError as error:
            if error.errno == errno.ESTALE:  # it was replaced just now, on a network file system
                return News()
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from None
        lines = [start, *lines] if start else lines
        records = [parse(line) for line in lines]
        if None in records:
            return self._once_more(before, lines[records.index(None)])
        found = [record for record in records if record is not None]
        return News(replaced, found.pop(0) if start else None, found)

    def _knows(self, file: BinaryIO) -> bool:
        file.seek(self._read - len(self._last))
        return file.read(len(self._last)) == self._last

    def _whole_lines(self, file: BinaryIO) -> tuple[bytes, list[bytes]]:
        """Return the line of the newest start, and the newest of those after it; the file may have millions."""
        start, evaluation = b"", b""
        newest: deque[bytes] = deque(maxlen=TREND_REPORTS)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._read, self._last = self._read + len(line), line
            kind = found[1].decode() if (found := KIND.match(line)) else None
            if kind == START:
                start, evaluation = line, b""
                newest.clear()
                continue
            evaluation = line if kind == EVALUATION else evaluation
            newest.append(line)
        return start, [*((evaluation,) if evaluation and evaluation not in newest else ()), *newest]

    def _once_more(self, before: tuple[int, bytes], bad: bytes) -> News:
        """Read again the next time: on network file systems a file may be longer before all of it can be read."""
        if bad == self._bad:
            raise UserError(f"{self.path}: a line is not a record; remove the line or the file")
        (self._read, self._last), self._bad = before, bad
        return News()


@dataclass(frozen=True)
class Pulse:
    """Which process trains in a run's folder, and whether it lives."""

    writer: Writer | None
    """None if there is none: the run has ended, or not begun."""
    alive: bool

    @property
    def here(self) -> bool:
        """Tell whether the process is, or was, one whose end can be seen from this machine."""
        return self.writer is not None and self.writer.is_here()


class LeaseWatch:
    """Watches the lease of a run's folder (`lock`).

    The clocks of machines differ. So a lease has expired if this machine has seen no renewal for a while; only what it
    knows at the first look is by the clocks.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = run_dir / LOCK_FILE
        self._clock = clock
        self._renewed: float | None = None
        self._seen = 0.0
        self._pulse = Pulse(None, False)

    def look(self) -> Pulse:
        """Return what the lease says now."""
        try:
            writer, renewed = read_lease(self._lease), renewed_at(self._lease)
        except FileNotFoundError:
            self._pulse = Pulse(None, False)
            return self._pulse
        except OSError:  # it was replaced just now; the metrics file says if the disk is gone
            return self._pulse
        if renewed != self._renewed:
            past = max(0.0, time.time() - renewed) if self._renewed is None else 0.0
            self._renewed, self._seen = renewed, self._clock() - past
        self._pulse = Pulse(writer, writer is not None and writer.may_live(self._clock() - self._seen))
        return self._pulse
