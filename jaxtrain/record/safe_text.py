"""Texts that may be kept and shown: without secrets, and without terminal commands.

Whatever writes a configuration to a file, or prints a line that may hold values of the
user's or texts from data, goes through here; `shown` puts a value into a message.
Nothing large is imported.
"""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

MASK = "***"
MOST_CHARACTERS = 240  # of one value in a message

# Words of a key under which every value is a secret.
_SECRET_WORDS = frozenset(
    {"password", "passwd", "pwd", "passphrase", "secret", "secrets", "credential",
     "credentials", "apikey"}
)  # fmt: skip
# Words of a key under which a string is one.
_KEY_WORDS = frozenset({"token", "key", "authorization", "bearer", "cookie"})
# What stands before "token" where it is a token of the vocabulary.
_VOCABULARY_WORDS = frozenset(
    {"pad", "eos", "bos", "unk", "mask", "sep", "cls", "special", "stop", "image"}
)
# What stands before "keys" and "tokens" where they are secrets.
_ACCESS_WORDS = frozenset({"api", "access", "auth", "secret", "private"})
# Parts of a signed URL whose names do not say that they are secrets.
_SIGNED_PARTS = frozenset(
    {"sig", "signature", "x-amz-signature", "x-amz-credential", "x-goog-signature",
     "x-goog-credential", "awsaccesskeyid", "auth"}
)  # fmt: skip

# Secrets that are known by their form, wherever they stand.
_BY_FORM = re.compile(
    r"""\bhf_[A-Za-z0-9]{16,}           # Hugging Face
    |\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}  # OpenAI, Anthropic and others
    |\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}
    |\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}
    |\bxox[abprs]-[A-Za-z0-9-]{10,}|\bwandb_v1_\w{16,}
    |\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*  # a JSON web token
    |(?<=Bearer\ )[\w.~+/=-]{8,}
    |-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----[\s\S]*?(?:-----END[ A-Z]*-----|\Z)
    """,
    re.VERBOSE,
)
# With the colon that may stand behind a value in a message.
_NUMBER = re.compile(r"-?\d{1,6}(\.\d{1,6})?:?")
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_PART_OF_URL = re.compile(r"(?<=[?&;])([\w.-]+)=([^&;#\s'\"]+)")
# `hub_token = 'x'`, `--hub_token=x`, `'api_key': 'x'`.
_SETTING = re.compile(
    r"""(?P<head>
        (?P<quote>['"]?)(?P<name>[A-Za-z_][\w.-]*)(?P=quote)
        (?:[ ]=[ ]|=|(?<=['"]):[ ]?)
    )
    (?P<value>'[^'\n]*'|"[^"\n]*"|[^\s'"{\[(,;&]+)""",
    re.VERBOSE,
)
# Control characters, but for the line's end and the tabulator.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of nested config values with the secrets replaced by `***`.

    Secret are: anything under a key with the word password, secret or credentials; a
    string under a key with the word token or key (`hf_token`, `apiKey`; but not
    `tokenizer`, `max_tokens`, `eos_token`); in any string, user and password in a URL,
    the signature of a signed one, and tokens that are known by their form (`hf_...`).
    """
    if isinstance(value, Mapping):
        inherited = name if _SECRET_WORDS & set(_words(name)) else ""
        return {
            key: mask_secrets(below, f"{inherited} {key}".strip())
            for key, below in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_secrets(below, name) for below in value]
    if is_secret(name, value):
        return MASK
    return _mask_forms(value) if isinstance(value, str) else value


def mask_text(text: str) -> str:
    """A message without secrets: those known by their form or by the key before them.

    `hub_token = 'x'`, `--api_key=x` and `{'api_key': 'x'}` lose the value.
    """

    def hide(found: re.Match[str]) -> str:
        # A number is no token, as in `num_key_value_heads = 2`.
        value = 0 if _NUMBER.fullmatch(found["value"]) else found["value"].strip("'\"")
        if value == "None" or not is_secret(found["name"], value):
            return found[0]
        quote = found["value"][0] if found["value"][0] in "'\"" else ""
        return f"{found['head']}{quote}{MASK}{quote}"

    return _mask_forms(_SETTING.sub(hide, text))


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: not what bytes that are no UTF-8 were read as."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escape_controls(text: str) -> str:
    r"""A text whose control characters are spelled, as `\x1b`: none steers a terminal.

    Ends of lines and tabulators stay.
    """
    return _CONTROLS.sub(
        lambda found: found[0].encode("unicode_escape").decode("ascii"), text
    )


def shown(value: Any, most: int = MOST_CHARACTERS) -> str:
    """A value in a message: its repr, with "..." for what is too long or too deep.

    A message that holds a value of a file or of a flag takes it from here: a plain
    repr of it may be millions of characters long, or raise RecursionError.
    """
    return cut(_SHORT.repr(value), most)


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """The first `most` characters of a text, and "..." where there are more."""
    return f"{text[:most]}..." if len(text) > most else text


class _ShortRepr(reprlib.Repr):
    """`repr` of bounded length; a mapping's keys in their own order."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxother = 5, 20, MOST_CHARACTERS
        self.maxlist = self.maxtuple = self.maxset = 20
        self.maxstring = MOST_CHARACTERS

    def repr_dict(self, mapping: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        items = list(mapping.items())[: self.maxdict]
        parts = [
            f"{self.repr1(name, level - 1)}: {self.repr1(value, level - 1)}"
            for name, value in items
        ]
        parts += ["..."] if len(mapping) > len(items) else []
        return f"{{{', '.join(parts)}}}"

    def repr_int(self, number: int, level: int) -> str:
        is_long = number.bit_length() > 256  # Python refuses to print the longest
        return "a very long integer" if is_long else repr(number)


_SHORT = _ShortRepr()


def is_secret(name: str, value: Any) -> bool:
    """Whether a key's name says that its value is a secret."""
    if value is None or value == "":
        return False
    words = _words(name)
    if _SECRET_WORDS & set(words):
        return True
    return isinstance(value, str) and any(
        (word in _KEY_WORDS and before not in _VOCABULARY_WORDS)
        or (word in ("keys", "tokens") and before in _ACCESS_WORDS)
        for before, word in zip(["", *words], words, strict=False)
    )


def _words(name: str) -> list[str]:
    """`apiKey` and `api-key` are `api`, `key`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.split(r"[^a-z0-9]+", spaced.lower())


def _mask_forms(text: str) -> str:
    def hide(found: re.Match[str]) -> str:
        name = found[1]
        hides = name.lower() in _SIGNED_PARTS or is_secret(name, found[2])
        return f"{name}={MASK}" if hides else found[0]

    masked = _CREDENTIALS_IN_URL.sub(MASK, text)
    if "://" in masked:
        masked = _PART_OF_URL.sub(hide, masked)
    return _BY_FORM.sub(MASK, masked)
