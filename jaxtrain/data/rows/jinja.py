"""Chat templates as a configuration gives them: the text, or the file of one."""

import pathlib

import jinja2

from jaxtrain.config.folders import bucket_cache
from jaxtrain.data.rows.sandbox import compile_template
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.mirror import mirror


def is_template_file(template: str) -> bool:
    """Whether this names a file, and is not itself a template."""
    return template.endswith((".jinja", ".j2", ".jinja2"))


def read_template(template: str, own: object = None) -> str:
    """A template's text, its syntax checked.

    Args:
        template: Jinja, or the path or the address of a .jinja, .jinja2 or .j2
            file, or the name of one of `own`, the tokenizer's.

    Raises:
        ValueError: there is no such file, or it is not Jinja; names the line.
    """
    named = own if isinstance(own, dict) else {}
    place, text = "chat_template", named.get(template, template)
    if is_template_file(template):
        path = pathlib.Path(template).expanduser()
        if is_remote(template):
            path = mirror(template, bucket_cache())
        if not path.is_file():
            raise ValueError(
                f"chat_template {shown(template)} does not exist: give a file, or the"
                " template itself"
            )
        place = f"chat_template {shown(template)}"
        text = path.read_text(encoding="utf-8")
    if "{{" not in text and "{%" not in text:
        raise ValueError(
            f"chat_template {shown(template)} would write the same text for every"
            " conversation, as it has neither {{ nor {%: give Jinja, the path of a file"
            " that ends in .jinja, .jinja2 or .j2, or the name of one of the tokenizer"
            f"'s templates ({', '.join(sorted(named)) or 'where it has several'})"
        )
    return checked(text, place, "unset data.chat_template to take the tokenizer's own")


def checked(text: str, place: str, instead: str) -> str:
    """The text. Raises ValueError with place and line where it is not Jinja."""
    try:
        compile_template(text)
    except Exception as error:  # of Jinja's parser, or of Python's on what it wrote
        line = getattr(error, "lineno", None)
        at = f", line {line}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{place}{at}: not Jinja: {reason}; mend it, or {instead}"
        ) from error
    return text
