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


def read_template(template: str) -> str:
    """A template's text, its syntax checked.

    Args:
        template: Jinja, or the path or the address of a .jinja, .jinja2 or .j2
            file.

    Raises:
        ValueError: there is no such file, or it is not Jinja; names the line.
    """
    place, text = "chat_template", template
    if is_template_file(template):
        path = pathlib.Path(template).expanduser()
        if is_remote(template):
            path = mirror(template, bucket_cache())
        if not path.is_file():
            raise ValueError(
                f"chat_template {shown(template)} does not exist: give a file, or the"
                " template itself"
            )
        place, text = (
            f"chat_template {shown(template)}",
            path.read_text(encoding="utf-8"),
        )
    if "{{" not in text and "{%" not in text:
        raise ValueError(
            f"chat_template {shown(template)} would write the same text for every"
            " conversation, as it has neither {{ nor {%: give Jinja, or the path of a"
            " file that ends in .jinja, .jinja2 or .j2"
        )
    try:
        compile_template(text)
    except Exception as error:  # of Jinja's parser, or of Python's on what it wrote
        line = getattr(error, "lineno", None)
        at = f", line {line}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{place}{at}: not Jinja: {reason}; mend it, or unset data.chat_template"
            " to take the tokenizer's own"
        ) from error
    return text
