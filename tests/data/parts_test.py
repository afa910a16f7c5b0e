"""Text parts: joined where a template wants strings, handed over where it does not."""

import pathlib

import pytest

from jaxtrain.data.rows.parts import fit_parts
from jaxtrain.data.rows.template import render_chat

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "-two"}]
TURNS = [("system", PARTS), ("user", PARTS), ("assistant", PARTS), ("user", "three"),
         ("assistant", PARTS)]  # fmt: skip
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
JOINED = [
    {"role": role, "content": "one-two" if content is PARTS else content}
    for role, content in TURNS
]

LOOP = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for part in m['content'] %}<{{ part['text'] }}>"
    "{% endfor %}{% endif %};{% endfor %}"
)
STRINGS = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
# Parts of the user alone, and only the first of the system's.
MIXED = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'user' and m['content']"
    " is not string %}{% for part in m['content'] %}{{ part['text'] }}|{% endfor %}"
    "{% elif m['role'] == 'system' and m['content'] is not string %}"
    "{{ m['content'][0]['text'] }}{% else %}{{ m['content'] + '' }}{% endif %};"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "system:one-two;user:one-two;assistant:one-two;user:three;"
                  "assistant:one-two;"),
        (LOOP, "system:<one><-two>;user:<one><-two>;assistant:<one><-two>;user:three;"
               "assistant:<one><-two>;"),
        (MIXED, "system:one-two;user:one|-two|;assistant:one-two;user:three;"
                "assistant:one-two;"),
    ],
)  # fmt: skip
def test_each_turn_is_as_the_template_takes_it(template, expected, bpe):
    bpe.chat_template = template
    assert render_chat(bpe, MESSAGES, {}) == expected


@pytest.mark.torch
def test_stock_templates_give_the_text_of_one_string(bpe):
    trl = pytest.importorskip("trl")
    names = sorted(
        (pathlib.Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    )
    for name in names:
        bpe.chat_template = name.read_text()
        first = "gemma" in name.stem  # knows no system turn
        found = render_chat(bpe, MESSAGES[first:], {}, add_generation_prompt=True)
        assert "one-two" in found and "'type'" not in found, name
        whole = render_chat(bpe, JOINED[first:], {}, add_generation_prompt=True)
        assert found == whole, name


def test_a_template_is_asked_once(bpe):
    asked = []

    def render(messages):
        asked.append(messages)
        return "".join(str(message["content"]) for message in messages)

    for _ in range(3):
        fitted = fit_parts(MESSAGES, "a template that is asked once", render)
        assert fitted == JOINED
    assert len(asked) == 2 * 3  # with parts and without, for each of three roles
