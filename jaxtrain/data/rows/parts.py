"""Text in parts (`[{"type": "text", "text": ...}]`), as a chat template wants it.

Some templates loop over parts, others take every content for a string: they fail, leave
it out, or write the Python list into the text. A few know nothing but parts, and lose
strings. Which a template does is found by rendering a conversation of which one turn
has two parts, once a template and role.
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
    """The messages, their contents strings or parts as the template wants them.

    A template that takes both gets them as they are.

    Args:
        messages: contents are strings, None, or lists of text parts.
        template: the Jinja source, by which answers are remembered.
        render: a conversation to text by that template, without other arguments.
    """
    return [_fit(message, template, _Unhashed(render)) for message in messages]


def _fit(message: Message, template: str, render: "_Unhashed") -> Message:
    content = message.get("content")
    if content is None:
        return message
    wanted = _wanted(template, message["role"], render)
    if isinstance(content, list) and wanted in ("strings", "part"):
        content = "".join(part["text"] for part in content)
    if isinstance(content, str) and wanted in ("part", "parts"):
        content = _one_part(content)
    return {**message, "content": content}


class _Unhashed:
    """A function that the memory of answers does not tell from another."""

    def __init__(self, render: Render) -> None:
        self._render = render

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0

    def text(self, roles: Sequence[str], contents: Sequence[Any]) -> str:
        """A conversation as text; "" where the template refuses it."""
        turns = zip(roles, contents, strict=True)
        try:
            return self._render([{"role": r, "content": c} for r, c in turns])
        except Exception:  # whatever a template raises that knows no such content
            return ""


@functools.lru_cache(_KEPT)
def _wanted(template: str, role: str, render: _Unhashed) -> str:
    """What a template takes as the content of a role.

    "strings", "parts", "both", or "part": a list of one.
    """
    roles = _TURNS.get(role, ("user", "assistant"))
    at = roles.index(role) if role in roles else 1
    roles = (*roles[:at], role, *roles[at + 1 :])
    joined = _FIRST + _SECOND
    parts = [*_one_part(_FIRST), *_one_part(_SECOND)]

    def text(probed: Any, other: Any) -> str:
        contents = [probed if turn == at else other for turn in range(len(roles))]
        return render.text(roles, contents)

    others: tuple[Any, Any] = ("x", _one_part("x"))  # other roles have wants too
    for other in others:
        if joined in (whole := text(joined, other)):
            found = text(parts, other)
            return "both" if found == whole or _are_written(found) else "strings"
    # Strings fail or get lost, as in templates of models for images.
    if any(_are_written(text(parts, other)) for other in others):
        return "parts"
    one = any(joined in text(_one_part(joined), other) for other in others)
    return "part" if one else "strings"


def _one_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _are_written(text: str) -> bool:
    """Whether a text has both parts. A list written out shows keys between them."""
    between, found, _ = text.partition(_FIRST)[2].partition(_SECOND)
    return bool(found) and "text" not in between
