"""Templates render as transformers renders them, and within limits."""

import threading
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtrain.data.rows import sandbox
from jaxtrain.data.rows.jinja import read_template
from jaxtrain.data.rows.sandbox import (
    LimitError,
    plain_data,
    plain_messages,
    render_template,
)

GROW = "{% set ns = namespace(s='aaaa', l=['a'], n=10) %}{% for i in range(99) %}"
TOO_MUCH = {
    "endless": "{% for i in range(10**12) %}a{% endfor %}",
    "loops in loops": "{% for i in range(90000) %}{% for j in range(90000) %}"
    "{% endfor %}{% endfor %}",
    "loops that skip": "{% for i in range(90000) %}{% for j in range(90000) if false %}"
    "{% endfor %}{% endfor %}",
    "output": "{% for i in range(90000) %}{{ 'a' * 9999 }}{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "product of a list": "{{ (10**10 * [0]) | length }}",
    "doubling": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by ~": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by blocks": GROW
    + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "doubling lists": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "doubling dicts": GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}",
    "squares": GROW + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "power": "{% set n = 10 ** (10 ** 9) %}",
    "slices": "{% set s = 'a' * 1000000 %}" + GROW
    + "{% set ns.l = ns.l + [s[1:], s[2:]] %}{% endfor %}",
    "center": "{{ 'a' | center(10**10) }}",
    "center of a constant": "{{ 'a' | center(10000000000) }}",
    "a method": "{{ 'a'.ljust(10**10) }}",
    "zeros": "{{ '1'.zfill(10**10) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format by a field": "{{ '{:{}}'.format(1, 10**10) }}",
    "format by %": "{{ '%10000000000d' % 1 }}",
    "the filter format": "{{ '%*d' | format(10**10, 1) }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}",
    "the filter replace": "{% set s = 'a' * 1000000 %}{{ s | replace('a', s) }}",
    "join": "{{ ('a' * 1000000).join('a' * 1000000) }}",
    "the filter join": "{{ range(90000) | join('a' * 1000000) }}",
    "many of a text": "{{ ['a' * 1000000] * 90000 }}",
    "indent": "{{ 'a' | indent(10**10, true) }}",
    "JSON": "{{ messages | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "map": "{{ range(90000) | map('center', 90000) | list | length }}",
    "sum of lists": "{{ ([['a']] * 1000000) | sum(start=[]) | length }}",
    "round": "{{ 1.5 | round(10**9) }}",
}  # fmt: skip
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hé 😀 <b>?"},
    {"role": "assistant", "content": " yes\n", "reasoning": "hm", "name": None},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
]
VARIABLES = {"tools": [{"name": "f", "n": 1.5}], "documents": None, "bos_token": "<s>"}
FEATURES = (
    "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ loop.index ~ '/' ~ messages | length }}:{{ m.role | upper }}\n"
    "  {%- if m.reasoning_content is defined %}({{ m.thinking + '!' }}){% endif %}\n"
    "{% generation %}{{ m.content | trim + '</s>' }}{% endgeneration %}"
    "{{ m['content'].strip()[:2] }}{{ m.tool_calls | tojson(indent=2) }}\n"
    "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}",
    "{% set ns = namespace(x=[], n=0) %}{% for m in messages[::-1] %}"
    "{% set ns.x = ns.x + [m.role] %}{% set ns.n = ns.n * 2 + 1 %}{% endfor %}"
    "{{ ns.x | join(', ') }} {{ ns.n }} {{ 'a' * 3 }} {{ '%s-%d' % ('x', 5) }}"
    "{{ '{} {}'.format(1, 'b') }} {{ {'a': (1, 2)} }} {{ tools | tojson }}",
    "{% macro say(m, quote='>') %}{{ quote }} {{ m.content | replace('yes', 'no') }}"
    "{% endmacro %}{% for m in messages %}{{ say(m) }}{% else %}none{% endfor %}"
    "{% set t %}[{{ say(messages[0], quote='*') }}]{% endset %}{{ t | length }}{{ t }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') "
    "| list }}{{ nothing }}{{ nothing | default('d') }}{{ dict(a=1) | items | list }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages[0].content + 1 }}",
    "{{ nothing.at.all }}",
    "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)


def render(template: str) -> str:
    return render_template(template, [{"role": "user", "content": "x"}], {})


@pytest.mark.parametrize("name", sorted(TOO_MUCH))
def test_a_template_that_asks_for_too_much_is_stopped(name, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 200_000)  # a tenth, to be quick
    with pytest.raises((LimitError, OverflowError)):  # Jinja's own limit of ranges
        render(TOO_MUCH[name])


def test_time_is_limited_in_threads_too(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    caught: list[Exception] = []
    template = (
        "{% set s = 'a' * 9000000 %}{% for a in range(90000) %}{{ 'b' in s }}"
        "{% endfor %}"
    )

    def work() -> None:
        try:
            render(template)
        except LimitError as error:
            caught.append(error)

    start = time.thread_time()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "seconds" in str(caught[0])
    assert time.thread_time() - start < 1
    assert render("{{ messages[0].content }}") == "x"  # the next render starts anew


def outcome(function: Any) -> Any:
    try:
        return function()
    except RecursionError:
        return RecursionError  # its text tells where the stack ended
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("template", FEATURES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_texts_spans_and_errors_are_those_of_transformers(
    template, add_generation_prompt
):
    options = {**VARIABLES, "add_generation_prompt": add_generation_prompt}

    def theirs() -> Any:
        (text,), (spans,) = render_jinja_template(
            [CONVERSATION],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **options,
        )
        return text, spans

    def ours() -> Any:
        spans: list[Any] = []
        messages = plain_messages(CONVERSATION)
        return render_template(template, messages, options, spans), spans

    assert outcome(ours) == outcome(theirs)


def test_templates_see_plain_data_only():
    class Word(str):
        def shout(self) -> str:
            return self.upper()

    seen = plain_data({"a": Word("b"), "c": (True, 1, [None]), "d": object()})
    assert seen == {"a": "b", "c": (True, 1, [None]), "d": "<object>"}
    assert type(seen["a"]) is str


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,  # Python nests 20 at most
        "{{ 1 | nofilter }}",
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused(template):
    with pytest.raises(ValueError, match="not Jinja"):
        read_template(template)
