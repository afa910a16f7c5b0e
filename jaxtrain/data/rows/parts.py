"""Text in parts (`[{"type": "text", "text": ...}]`), as a chat template wants it.

Some templates loop over parts, others take every content for a string: they fail, leave
it out, or write the Python list into the text. Which a template does is found by
rendering a conversation of which one turn has two parts, once a template and role.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[list[Message]], str]

# No template alters plain letters.
_FIRST, _SECOND = "jaxtrainparta", "jaxtrainpartb"
_TURNS: Mapping[str, tuple[str, ...]] = {  # of a role -> roles before it and behind it
    "system": ("system", "user", "assistant"),
    "developer": ("developer", "user", "assistant"),
    "tool": ("user", "assistant", "tool", "assistant"),
}
_KEPT = 256  # templates and roles that are remembered


def fit_parts(
    messages: Sequence[Message], template: str, render: Render
) -> list[Message]:
    """The messages, parts joined to one string where the template wants a string.

    Args:
        messages: contents are strings, None, or lists of text parts.
        template: the Jinja source, by which answers are remembered.
        render: a conversation to text by that template, without other arguments.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return list(messages)
    return [_fit(message, template, render) for message in messages]


def _fit(message: Message, template: str, render: Render) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if _takes_parts(template, message["role"], _Unhashed(render)):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


class _Unhashed:
    """A function that the memory of answers does not tell from another."""

    def __init__(self, render: Render) -> None:
        self.render = render

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(_KEPT)
def _takes_parts(template: str, role: str, render: _Unhashed) -> bool:
    """Whether the template writes the texts of two parts, and nothing else of them."""
    roles = _TURNS.get(role, ("user", "assistant"))
    plain: list[Message] = [{"role": each, "content": "x"} for each in roles]
    at = roles.index(role) if role in roles else 1
    texts = (_FIRST, _SECOND)
    parts = [{"type": "text", "text": text} for text in texts]
    in_parts = [*plain[:at], {"role": role, "content": parts}, *plain[at + 1 :]]
    joined = [*plain[:at], {"role": role, "content": "".join(texts)}, *plain[at + 1 :]]
    try:
        found, whole = render.render(in_parts), render.render(joined)
    except Exception:  # whatever a template raises that does not know parts
        return False
    if found == whole:
        return True
    # Some put something between parts. A list written out shows its keys and quotes.
    between = found.partition(_FIRST)[2].partition(_SECOND)
    return bool(between[1]) and "text" not in between[0]
