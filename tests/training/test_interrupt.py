"""Signals, sent to real processes."""

import signal

import pytest

HEAD = """
import ctypes, os, signal, sys, time
from saekit.training.interrupt import BY_SCHEDULER, BY_USER, graceful_interrupt
me = os.getpid()
say = lambda text: os.write(1, (text + chr(10)).encode())
"""


@pytest.fixture
def run(forked):
    """Run some lines in a process of its own; its exit code and what it printed."""

    def run(body):
        result = forked.complete("-c", HEAD + body)
        return result.returncode, result.stdout + result.stderr

    return run


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_asks_and_what_is_done_in_time_ends_as_it_likes(run, name):
    code, said = run(f"""
before = signal.getsignal(signal.{name})
with graceful_interrupt(0.5, say) as interruption:
    os.kill(me, signal.{name})
    assert interruption.request == BY_SCHEDULER
    os.kill(me, signal.{name})
    assert interruption.request == BY_SCHEDULER
assert signal.getsignal(signal.{name}) == before
time.sleep(1)
say("done")
""")
    assert (code, said) == (0, "done\n")


STUCK = "mutex = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock; lock(mutex); lock(mutex)"


@pytest.mark.parametrize("waiting", ["time.sleep(50)", STUCK], ids=["in Python", "inside a library"])
def test_what_takes_longer_than_the_grace_ends(run, waiting):
    code, said = run(f"""
import threading
with graceful_interrupt(0.5, say):
    threading.Timer(0.2, lambda: os.kill(me, signal.SIGTERM)).start()
    threading.Timer(0.5, lambda: os.kill(me, signal.SIGTERM)).start()
    {waiting}
""")
    assert code == 128 + signal.SIGTERM
    assert said == "SIGTERM arrived, and the step was not finished and saved within --grace 0.5 seconds\n"


def test_ctrl_c_twice(run):
    code, said = run("""
with graceful_interrupt(0.5, say) as interruption:
    os.kill(me, signal.SIGTERM)
    os.kill(me, signal.SIGINT)
    assert interruption.request == BY_USER
    try:
        os.kill(me, signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        say("now")
""")
    assert (code, said) == (0, "now\n")
