"""Assistant turns are found in time linear in them, as their beginnings tell."""

import itertools
import json
import pathlib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtrain import assets
from jaxtrain.data.rows import template as template_module
from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.template import render_with_spans
from jaxtrain.data.rows.turns import find_spans_by_beginnings

# Written here after the kinds that models have.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if m.content else '' }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}<|eom_id|>"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else "
        "m.role %}{{ '<start_of_turn>' + role + '\n' + (m.content | trim) + "
        "'<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ ' ' + m.content + eos_token }}{% elif m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ '[' + m.role + '] ' + m.content }}{% endif %}{% endfor %}"
    ),
    "last thought": (  # a last turn gets a thought, earlier ones lose theirs
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% set c = m.content %}{% if m.role == 'assistant' %}"
        "{% set t = '' %}{% if '</think>' in c %}"
        "{% set t = c.split('</think>')[0].split('<think>')[-1] %}"
        "{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{% if loop.last %}{{ '<think>' + t + '</think>' }}{% endif %}{% endif %}"
        "{{ c + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think></think>' }}{% endif %}{% endif %}"
    ),
    "dates": (  # the position of a turn is in its text
        "{% for m in messages %}{{ '<' ~ loop.index ~ m.role ~ '>' ~ m.content ~ "
        "'</>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<' ~ (messages | length + 1) ~ "
        "'assistant>' }}{% endif %}"
    ),
    "counting": "{{ messages | length }}{% for m in messages %}{{ m.content }}"
    "{% endfor %}",
    "short memory": (
        "{% for m in messages[-4:] %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ),
}
MARKERS = [
    "<|im_end|>\n<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n",
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n", "<end_of_turn>\n",
    "<end_of_turn>\n<start_of_turn>user\n", "<|end|>\n<|user|>\n", "<|end|>\n</s>",
    "</s>[INST] ", " [/INST]", "<think>why</think>", "<think>", "</think>", "<|end|>",
    "<|end|><|user|>", "jaxtrainstandin", "jaxtrainstandin00000", "</s>",
]  # fmt: skip
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
contents = st.one_of(
    st.sampled_from(["", " ", "yes", "yes", "\n", "é😀", " padded \n", "<"]),
    st.lists(st.sampled_from(["a", " ", *MARKERS]), max_size=4).map("".join),
)


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    messages = []
    if draw(st.integers(0, 4)) == 0:
        messages.append({"role": "system", "content": draw(contents)})
    for _ in range(draw(st.integers(1, 5))):
        messages.append({"role": "user", "content": draw(contents)})
        if draw(st.integers(0, 5)) == 0:
            messages += [
                {"role": "assistant", "content": draw(contents), "tool_calls": CALL},
                {"role": "tool", "content": draw(contents)},
            ]
        if draw(st.integers(0, 7)):
            messages.append({"role": "assistant", "content": draw(contents)})
        if draw(st.integers(0, 9)) == 0:
            messages.append({"role": "assistant", "content": draw(contents)})
    return messages


class Tokenizer:
    """As much of a tokenizer as rendering takes."""

    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}
    eos_token = "</s>"

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def get_chat_template(self, template: str | None, tools: Any) -> str:
        return template or self.chat_template


def by_beginnings(tokenizer: Tokenizer, messages: Any, variables: Any) -> Any:
    """The text and spans that transformers' own renders of all beginnings tell."""

    def render(part: Any, *, add_generation_prompt: bool = False) -> str:
        known = {**tokenizer.special_tokens_map, **variables}
        try:
            (text,), _ = render_jinja_template(
                [part],
                chat_template=tokenizer.chat_template,
                add_generation_prompt=add_generation_prompt,
                **known,
            )
        except Exception as error:
            raise BadRow(str(error)) from error
        return text

    spans = find_spans_by_beginnings(render, messages, closing=tokenizer.eos_token)
    return render(messages), spans


def check(template: str, messages: Any, variables: Any) -> None:
    tokenizer: Any = Tokenizer(template)
    try:
        expected = by_beginnings(tokenizer, messages, variables)
    except BadRow:
        return  # the linear way may tell what the beginnings leave open
    assert render_with_spans(tokenizer, messages, variables) == expected


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=60, deadline=None)
@given(messages=conversations(), thinks=st.sampled_from([None, True, False]))
def test_spans_are_those_of_the_beginnings(name, messages, thinks):
    check(TEMPLATES[name], messages, {} if thinks is None else {"enable_thinking": thinks})
