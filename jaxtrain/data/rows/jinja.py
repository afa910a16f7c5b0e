"""Chat templates as a configuration gives them: the text, or the file of one."""

import pathlib
import re

import jinja2

# transformers' own tag, which marks what the assistant wrote.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def read_template(template: str) -> str:
    """A template's text, its syntax checked.

    Args:
        template: Jinja, or the path of a .jinja, .jinja2 or .j2 file.

    Raises:
        ValueError: there is no such file, or it is not Jinja; names the line.
    """
    place, text = "chat_template", template
    if template.endswith((".jinja", ".j2", ".jinja2")):
        path = pathlib.Path(template).expanduser()
        if not path.is_file():
            raise ValueError(
                f"chat_template {template!r} does not exist: give a file, or the"
                " template itself"
            )
        place, text = f"chat_template {template!r}", path.read_text(encoding="utf-8")
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(_GENERATION.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{place}, line {error.lineno}: not Jinja: {error.message}; mend it, or"
            " unset data.chat_template to take the tokenizer's own"
        ) from error
    return text
