"""Assistant turns are found in time linear in them, as their beginnings tell."""

import collections
import functools
import importlib.util
import pathlib
import re
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
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
    "no tools": (  # a turn that is not written, before a closing text
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
        "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
    ),
    "short memory": (
        "{% for m in messages[-4:] %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ),
}
# The generation prompt depends on the question.
SWITCH = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if 'why' in messages[-1].content %}{{ '<why>' }}{% endif %}{% endif %}"
)
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

    special_tokens_map: ClassVar = {"bos_token": "<s>", "eos_token": "</s>"}
    eos_token = "</s>"

    def __init__(self, template: str) -> None:
        self.chat_template, self.name_or_path = template, "t"

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


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=60, deadline=None)
@given(messages=conversations(), thinks=st.sampled_from([None, True, False]))
def test_spans_are_those_of_the_beginnings(name, messages, thinks):
    tokenizer: Any = Tokenizer(TEMPLATES[name])
    variables = {} if thinks is None else {"enable_thinking": thinks}
    try:
        expected = by_beginnings(tokenizer, messages, variables)
    except BadRow:
        return  # what the beginnings leave open, the linear way may tell
    assert render_with_spans(tokenizer, messages, variables) == expected


def talk(*said: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(said)
    return [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (  # what stands between two turns, within the first of them
            TEMPLATES["last thought"],
            talk(
                *("?", "<think>t</think>a<|end|><|user|>q<|end|><|assistant|>"),
                *("q", "<think>t</think>b", "z", "c"),
            ),
        ),
        (SWITCH, talk("?", "one", "why", "<b>")),
        (
            TEMPLATES["no tools"],
            [*talk("?", "one", "q", "two"), {"role": "tool", "content": "6"}],
        ),
    ],
)
def test_spans_of_hard_cases_are_those_of_the_beginnings(template, messages):
    tokenizer: Any = Tokenizer(template)
    expected = by_beginnings(tokenizer, messages, {})
    assert render_with_spans(tokenizer, messages, {}) == expected


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_spans_of_stock_qwen3_are_those_of_the_beginnings(qwen3, messages):
    try:
        expected = by_beginnings(qwen3, messages, {})
    except BadRow:
        return
    assert render_with_spans(qwen3, messages, {}) == expected


@functools.cache
def unmarked_template() -> str:
    folder = assets.asset_path(assets.TOKENIZER)
    marked = AutoTokenizer.from_pretrained(str(folder)).chat_template
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", marked)


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_spans_of_the_embedded_template_without_its_marks(messages):
    tokenizer: Any = Tokenizer(unmarked_template())
    try:
        expected = by_beginnings(tokenizer, messages, {})
    except BadRow:
        return
    assert render_with_spans(tokenizer, messages, {}) == expected


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    ["qwen2_5", "qwen3_6", "llama3", "gemma", "phi3_5", "deepseek_r1_distill"],
)
@settings(max_examples=25, deadline=None)
@given(messages=conversations())
def test_spans_of_published_templates_are_those_of_the_beginnings(name, messages):
    found = importlib.util.find_spec("trl")  # its templates: nothing is imported
    if found is None or found.origin is None:
        pytest.skip("TRL is not installed")
    folder = pathlib.Path(found.origin).parent / "chat_templates"
    tokenizer: Any = Tokenizer((folder / f"{name}.jinja").read_text(encoding="utf-8"))
    try:
        expected = by_beginnings(tokenizer, messages, {})
    except BadRow:
        return
    assert render_with_spans(tokenizer, messages, {}) == expected


def long_conversation(turns: int) -> list[dict[str, str]]:
    roles = ("user", "assistant") * turns
    said = ("Why?", "<think>\nhm\n</think>\n\nBecause.", "Why?", "Because.")
    return [
        {"role": role, "content": said[i % len(said)]} for i, role in enumerate(roles)
    ]


@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "gemma", "phi3", "mistral", "last thought"]
)
def test_the_number_of_renders_does_not_grow_with_the_turns(name, monkeypatch):
    counts: collections.Counter[int] = collections.Counter()
    render = template_module.render_template
    tokenizer: Any = Tokenizer(TEMPLATES[name])
    for turns in (2, 2, 40):
        counts[turns] = 0  # the first finds what the template writes around a turn

        def counted(*args: Any, turns: int = turns) -> str:
            counts[turns] += 1
            return render(*args)

        monkeypatch.setattr(template_module, "render_template", counted)
        text, spans = render_with_spans(tokenizer, long_conversation(turns), {})
        assert len(spans) == turns
        assert all("Because." in text[start:stop] for start, stop in spans)
        assert all("Why?" not in text[start:stop] for start, stop in spans)
    assert counts[2] == counts[40] == 3


def test_a_template_that_counts_its_messages_is_refused_as_before():
    tokenizer: Any = Tokenizer(TEMPLATES["counting"])
    with pytest.raises(BadRow, match="not prefix-stable"):
        render_with_spans(tokenizer, long_conversation(2), {})


def test_what_beginnings_cannot_tell_is_told_right():
    # The tool's turn ends a beginning whose thought a later question takes away.
    messages = [
        {"role": "user", "content": "2 * 3?"},
        {"role": "assistant", "content": "<think>t</think>let me see"},
        {"role": "assistant", "content": "<think>u</think>6"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "<think>v</think>no more"},
    ]
    tokenizer: Any = Tokenizer(TEMPLATES["last thought"])
    with pytest.raises(BadRow):
        by_beginnings(tokenizer, messages, {})
    text, spans = render_with_spans(tokenizer, messages, {})
    assert [text[start:stop] for start, stop in spans] == [
        "let me see<|end|>",
        "6<|end|>",
        "<think>v</think>no more<|end|>",
    ]
