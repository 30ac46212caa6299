"""Ask for processes that are copies of one which has imported everything, see `tests.forked`.

As a script it stands in for `python`. A copy runs the program with this process's environment, folder and files. It
gets this process's signals, this process ends with its exit code, and killing this process kills the copy. Starting
`python -m saekit` takes ten times as long, because it imports everything.
"""

import json
import os
import select
import signal
import socket
import sys
import time

ADDRESS, PYTHON = "SAEKIT_COPIES", "SAEKIT_COPIES_PYTHON"
"""Variables of the environment: where to ask, and the path of the stand-in."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Copy:
    """A process that runs what `python ARGUMENTS...` would run.

    Args:
        arguments: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`.
        environment: All of it.
        cwd: Its folder.
        files: Its standard input, output and error.
        options: `devices`, for `tests.strict.install`.
    """

    def __init__(self, arguments, environment, cwd, files, **options):
        self._said = socket.socket(socket.AF_UNIX)
        self._said.connect(environment[ADDRESS])
        asked = {"arguments": list(map(str, arguments)), "environment": dict(environment), "cwd": str(cwd), **options}
        text = json.dumps(asked).encode()
        alive, self._alive = os.pipe()  # only this process has its other end: the copy is killed when that is closed
        socket.send_fds(self._said, [len(text).to_bytes(4, "big")], [*files, alive])
        os.close(alive)
        self._said.sendall(text)
        self.returncode = None
        self.pid = self._number()

    def _number(self):
        return int.from_bytes(self._said.recv(4, socket.MSG_WAITALL), "big", signed=True)

    def fileno(self):
        """Readable once it has ended."""
        return self._said.fileno()

    def poll(self, timeout=0.0):
        """Return the exit code, or None if it has not ended within so many seconds."""
        if self.returncode is None and select.select([self], [], [], timeout)[0]:
            self.returncode = self._number()
            self._said.close()
            os.close(self._alive)
        return self.returncode

    def wait(self, timeout=None):
        """Return the exit code once it has ended; TimeoutError if that takes longer."""
        if self.poll(timeout) is None:
            raise TimeoutError(f"process {self.pid} has not ended")
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def wait_for(copies, timeout):
    """The exit codes, once all have ended; from the first error on the others have as long as a launcher gives."""
    until, failed = time.monotonic() + timeout, False
    while running := [copy for copy in copies if copy.returncode is None]:
        for copy in select.select(running, [], [], max(0.0, until - time.monotonic()))[0]:
            copy.poll()
        if not failed and any(copy.returncode for copy in copies):
            failed, until = True, time.monotonic() + 30
            for copy in running:
                copy.send_signal(signal.SIGTERM)
        if time.monotonic() > until:
            for copy in running:
                copy.kill()
    return [copy.returncode for copy in copies]


def stand_in():
    """Be one of them, as far as others can tell."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    arguments = sys.argv[1:]
    while arguments[0] == "-u":  # what is written arrives at once only where it is flushed
        del arguments[0]
    copy = Copy(arguments, os.environ, os.getcwd(), (0, 1, 2), unbuffered=sys.argv[1] == "-u")
    for number in FORWARDED:
        signal.signal(number, lambda number, _: copy.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = copy.wait()
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    stand_in()
