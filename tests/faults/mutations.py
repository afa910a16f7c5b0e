"""Small changes to trees of JSON, texts and bytes, all by one random generator."""

import copy
import random
from collections.abc import Iterator
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 3.5, -0.5, 1e-9, 1e300, -1e300, 10**9, 2**31, 2**63, 10**30,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "true", "null", "nan", "1e5", "0", "-1", "auto", "default",
    "../../x", "/dev/null", "a\0b", "a\nb", "\x1b[31m", "\ufeff", "\u202e", "é", "字",
    "\ud800", "{{ x }}", "{% for", "(", "[a", "(?P<", "(a+)+$", "*", "{}", "[]",
    "%s", "a.b.c", "a" * 300, "<|endoftext|>", "__class__", "1,2,3",
)  # fmt: skip
TOKENS = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b"'", b":", b",",
    b"\n", b"\r", b"\t", b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"? ",
    b"!!binary ", b"!!int x", b"!!timestamp x", b"!!float x", b"!!bool x", b"| ", b"> ",
    b"---\n", b"...\n", b"%YAML 9.9\n", b"%TAG ! x\n", b"- ", b"#", b"2020-99-99",
    b"0x", b"1:60:60", b"0b2", b"1e999", b"-.inf", b".nan", b"null", b"~", b"\\ud800",
    b"NaN", b"Infinity", b"9" * 5000, b"[" * 3000, b"{\"a\":" * 3000, b"(" * 300,
    b"\xed\xa0\x80", b"\xc0\x80", b"\x1a", b"\x85", b"=", b"`", b"@", b"{{", b"{%",
)  # fmt: skip


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type that JSON and YAML know."""
    draw = rng.randrange(9 if depth < 3 else 6)
    if draw < 2:
        return rng.choice(NUMBERS)
    if draw < 4:
        return rng.choice(TEXTS)
    if draw < 6:
        return rng.choice((None, True, False, [], {}, [None], {"": 0}))
    if draw == 6:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if draw == 7:
        return {
            rng.choice(TEXTS): odd_value(rng, depth + 1)
            for _ in range(rng.randrange(4))
        }
    return nested(rng, rng.choice((3, 60, 3000)) if depth == 0 else 3)


def nested(rng: random.Random, depth: int) -> Any:
    """A value within so many lists or mappings."""
    value: Any = rng.choice(NUMBERS)
    is_list = rng.random() < 0.5
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


def mutate(rng: random.Random, tree: Any, changes: int = 1) -> Any:
    """A copy of a tree of JSON with so many places changed."""
    tree = copy.deepcopy(tree)
    for _ in range(changes):
        places = list(_places(tree))
        if not places:
            return odd_value(rng)
        _change(rng, *rng.choice(places))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a tree with each key in it; a few of what is deep or long."""
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        keys: Any = ()
        if isinstance(node, dict):
            keys = list(node)[:200]
        elif isinstance(node, list):
            keys = range(min(len(node), 50))
        for key in keys:
            yield node, key
            if depth < 12:
                waiting.append((node[key], depth + 1))


def _change(rng: random.Random, node: Any, key: Any) -> None:
    value, draw = node[key], rng.randrange(12)
    if draw < 4:
        node[key] = odd_value(rng)
    elif draw == 4:
        del node[key]
    elif draw == 5:
        node[key] = rng.choice(([value], {"a": value}, [value, value], f"{key}"))
    elif draw == 6 and isinstance(node, dict):
        node[rng.choice((f"{key}x", key[:-1], key.upper(), *TEXTS))] = value
    elif draw == 7 and isinstance(value, str):
        node[key] = mutate_text(rng, value)
    elif draw == 8 and isinstance(value, int | float):
        node[key] = rng.choice((-value, value + 1, value * 1000, value * 10**9, -1e300))
    elif draw == 9 and isinstance(node, list):
        node.insert(key, odd_value(rng))
    elif draw == 10:
        node[key] = None
    else:
        node[key] = rng.choice(NUMBERS)


def mutate_text(rng: random.Random, text: str) -> str:
    """A text with a piece lost, doubled, or put into it."""
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.randrange(1, 9))
    piece = rng.choice(("", text[at:end] * 2, rng.choice(TEXTS)))
    return text[:at] + piece + text[end:]


def mutate_bytes(rng: random.Random, data: bytes, changes: int = 1) -> bytes:
    """Bytes with so many places changed: a bit, a cut, a piece doubled or put in."""
    out = bytearray(data)
    for _ in range(changes):
        at = rng.randrange(len(out) + 1)
        draw = rng.randrange(6)
        if draw == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif draw == 1:
            del out[at:]
        elif draw == 2:
            del out[at : at + rng.randrange(1, 40)]
        elif draw == 3:
            piece = out[at : at + rng.randrange(1, 200)]
            out[at:at] = piece * rng.choice((1, 1, 2, 50))
        else:
            out[at:at] = rng.choice(TOKENS)
    return bytes(out)
