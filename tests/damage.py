"""Damaged files for property tests: content that was changed as disks, copies and editors change it."""

import json
import signal
from contextlib import contextmanager

SECONDS = 30
"""After which a reader counts as hanging."""
TOKENS = [
    *(b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'"x"', b'""', b"9" * 25, b"1" * 5000, b"0.5"),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\n",
        b": ",
        b", ",
        b"- ",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"[" * 3000,
        b"\\u0000",
        b"&a *a",
    ),
]
"""What turns a value into another kind of value, or a file into no file of its format."""
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 4, 5, 8, 24, 31, 64, 0.5, 1.0, -0.25, float("nan"), float("inf")),
    *(2**31, 2**63 - 1, 2**63, 10**30, 10**400, -(10**400), 1e308),
    *("", "x", "a\nb", "\x00", "../x", "/", "layers.1", "layers.1\n", "F64", "BF16", "I64", "topk", "groupmax", "é"),
    *([], [1], ["x"], [[]], {}, {"x": 1}, {"bytes": 1}, [8, 24], [24, 8], [192], [0, 0]),
]


def damaged(content, random):
    """Change bytes, or as often, where it is JSON, whole entries."""
    try:
        json.loads(content)
    except ValueError:
        return damaged_bytes(content, random)
    return random.choice([damaged_bytes, _damaged_json])(content, random)


def damaged_bytes(content, random):
    """Make up to three changes: bits, tokens, pieces that are missing, twice or moved."""
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(content) + 1)
        end = min(len(content), at + random.choice([1, 1, 1, 2, 7, 40, 10**6]))
        piece = content[at:end]
        rest = content[:at] + content[end:]
        kind = random.choice(["bits", "bits", "token", "insert", "missing", "twice", "moved"])
        if kind == "moved":
            at = random.randrange(len(rest) + 1)
        piece = {
            "bits": bytes(each ^ random.randint(1, 255) for each in piece[:1]) + piece[1:],
            "token": random.choice(TOKENS),
            "insert": random.choice(TOKENS) + piece,
            "missing": b"",
            "twice": piece * 2,
            "moved": piece,
        }[kind]
        content = rest[:at] + piece + rest[at:]
    return content


def _damaged_json(content, random):
    """One to three entries, at any depth, are missing, called otherwise, or have another value."""
    whole = json.loads(content)
    for _ in range(random.randint(1, 3)):
        inside, parent, entry = whole, None, None
        while isinstance(inside, (dict, list)) and inside:
            parent, entry = inside, random.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            inside = parent[entry]
            if random.random() < 0.4:
                break
        if parent is None:
            break
        kind = random.choice(["value", "value", "missing", "renamed"])
        if kind == "value":
            parent[entry] = json.loads(json.dumps(random.choice(VALUES)))
        else:
            value = parent.pop(entry)
            if kind == "renamed" and isinstance(parent, dict):
                parent[random.choice(["x", "", f"{entry}x", f"{entry}"[1:], "format", "d_in", "k"])] = value
    return json.dumps(whole).encode()


@contextmanager
def no_hang():
    """Fail if what is inside does not end."""

    def hang(*_):
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
