"""Which of the assistant's text is trained: options, message fields, thoughts."""

import gc
from collections.abc import Iterator

import pytest

from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.marks import AssistantMarks, drop_thoughts
from jaxtrain.data.rows.template import render_chat, render_with_spans

# Drops the thoughts of all turns but the last, and gives that an empty one, as Qwen 3.
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set t = '' %}{% if '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a thought.
OPENING = (
    "{% for m in messages %}{{ m.role + ':' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n' }}{% endif %}"
    "{{ m.content + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:<think>\n' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def trained(tokenizer, messages, **marks):
    text, spans = render_with_spans(tokenizer, messages, {}, AssistantMarks(**marks))
    return [text[start:stop] for start, stop in spans]


TWO = [user("a"), assistant("one"), user("b"), assistant("two")]


def test_the_last_turn_alone_may_be_trained(bpe, marked_template):
    for template in (bpe.chat_template, marked_template):
        bpe.chat_template = template
        assert trained(bpe, TWO) == ["one<|im_end|>\n", "two<|im_end|>\n"]
        assert trained(bpe, TWO, turns="last") == ["two<|im_end|>\n"]
        assert trained(bpe, [*TWO, user("c")], turns="last") == ["two<|im_end|>\n"]


def test_fields_of_messages_overrule_the_option_and_reach_no_template(
    bpe, marked_template
):
    header = "{{ '<|im_start|>' + message['role']"
    shows_keys = bpe.chat_template.replace(header, "{{ message | list }}" + header)
    bpe.chat_template = shows_keys
    plain, _ = render_with_spans(bpe, TWO, {})
    for off, on in (
        ({"train": False}, {"train": True}),
        ({"weight": 0}, {"weight": 1}),
    ):
        first = [user("a"), assistant("one", **on), user("b"), assistant("two", **off)]
        text, spans = render_with_spans(bpe, first, {}, AssistantMarks(turns="last"))
        assert text == plain
        (said,) = [text[a:b] for a, b in spans]
        assert said == "['role', 'content']<|im_start|>assistant\none<|im_end|>\n"
        assert render_chat(bpe, first[:2], {}) == render_chat(bpe, TWO[:2], {})
    bpe.chat_template = marked_template
    assert trained(bpe, [*TWO[:3], assistant("two", weight=0.0)]) == ["one<|im_end|>\n"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (assistant("x", weight=0.5), "weight 0.5: use 0 or 1"),
        (assistant("x", weight=True), "weight True: use 0 or 1"),
        (assistant("x", weight="1"), "weight '1'"),
        (assistant("x", train="no"), "train 'no': use true or false"),
        (assistant("x", train=1), "train 1"),
        (assistant("x", train=True, weight=0), "contradict"),
        (user("x") | {"train": True}, "the user's: only assistant turns"),
    ],
)
def test_other_values_of_the_fields_make_a_bad_row(bpe, message, reason):
    for render in (render_with_spans, render_chat):
        with pytest.raises(BadRow, match=reason):
            render(bpe, [*TWO, user("?"), message], {})


def test_a_field_that_nothing_would_read_is_refused(bpe):
    row = {"messages": [*TWO[:3], assistant("two", weight=0)]}
    with pytest.raises(ValueError, match="only assistant_only_loss reads"):
        prepare([row], bpe, PrepareOptions("next_token", 64))
    kept = {"messages": [*TWO[:3], assistant("two", weight=1)]}
    prepare([kept], bpe, PrepareOptions("next_token", 64))
    with pytest.raises(ValueError, match="set assistant_only_loss=True"):
        PrepareOptions("next_token", 64, assistant_marks=AssistantMarks("last"))


def test_a_conversation_of_which_nothing_is_trained_is_a_bad_row(bpe):
    row = {"messages": [user("a"), assistant("one", train=False)]}
    with pytest.raises(ValueError, match="no token is the assistant's"):
        prepare([row], bpe, PrepareOptions("next_token", 64, assistant_only_loss=True))


def test_generation_marks_that_are_not_one_a_turn_cannot_be_chosen_among(bpe):
    bpe.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfor %}"
    )
    with pytest.raises(BadRow, match=r"marks 4 texts of 2 assistant turns"):
        trained(bpe, TWO, turns="last")


def test_thoughts_may_be_masked(bpe):
    bpe.chat_template = REASONING
    messages = [*TWO[:3], assistant("<think>hm</think>two")]
    assert trained(bpe, messages) == [
        "one<|im_end|>\n",
        "<think>\nhm\n</think>\n\ntwo<|im_end|>\n",
    ]
    assert trained(bpe, messages, thinking=False) == [
        "one<|im_end|>\n",
        "two<|im_end|>\n",
    ]
    bpe.chat_template = OPENING
    messages = [user("a"), assistant("hm\n</think>\n\none"), user("b"), assistant("hm")]
    assert trained(bpe, messages, thinking=False) == ["one;"]
    assert trained(bpe, messages) == ["hm\n</think>\n\none;", "hm;"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<think>a</think>\n\nb<think>c</think>d", ["b", "d"]),
        ("[THINK]a[/THINK]b", ["b"]),
        ("a<think>cut off", ["a"]),
        ("a</think>b", ["a</think>b"]),
        ("<think></think>", []),
    ],
)
def test_blocks_of_thoughts_are_cut_out_of_spans(text, kept):
    spans = drop_thoughts(f"x{text}x", [(1, 1 + len(text))])
    assert [f"x{text}x"[start:stop] for start, stop in spans] == kept


def test_preserved_thoughts_are_written_as_in_the_last_turn(bpe):
    bpe.chat_template = REASONING
    messages = [
        user("a"), assistant("<think>hm</think>one"), user("b"),
        assistant("two"), user("c"), assistant("three"),
    ]  # fmt: skip
    assert trained(bpe, messages, preserve_thinking=True) == [
        "<think>\nhm\n</think>\n\none<|im_end|>\n",
        "<think>\n\n</think>\n\ntwo<|im_end|>\n",
        "<think>\n\n</think>\n\nthree<|im_end|>\n",
    ]
    text, _ = render_with_spans(
        bpe, messages, {}, AssistantMarks(preserve_thinking=True)
    )
    ends = [render_chat(bpe, messages[:n], {}) for n in (2, 4, 6)]
    said = [end.rpartition("<|im_start|>assistant\n")[2] for end in ends]
    asked = [f"<|im_start|>user\n{c}<|im_end|>\n<|im_start|>assistant\n" for c in "abc"]
    assert text == "".join(a + b for a, b in zip(asked, said, strict=True))


def test_preserve_thinking_is_refused_where_it_cannot_act(bpe, marked_template):
    marks = AssistantMarks(preserve_thinking=True)
    options = PrepareOptions(
        "next_token", 64, assistant_only_loss=True, assistant_marks=marks
    )
    pair = {"prompt": [user("a")], "completion": [assistant("b")]}
    with pytest.raises(ValueError, match="needs messages"):
        prepare([pair], bpe, options)
    bpe.chat_template = marked_template
    with pytest.raises(ValueError, match="marks with"):
        prepare([{"messages": TWO}], bpe, options)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What is freed in the depth of a recursion could not be, and pytest would fail."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ nothing.at.all }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 'a' * 10**10 }}",
        "{% for",
        "{{ 1 / 0 }}",
    ],
)
def test_whatever_a_rows_template_raises_is_one_bad_row(bpe, template, no_collection):
    bad = {"messages": TWO, "chat_template_kwargs": {"chat_template": template}}
    good = {"messages": TWO, "chat_template_kwargs": {}}
    for options in ({}, {"assistant_only_loss": True}):
        skip = PrepareOptions("next_token", 64, on_bad_row="skip", **options)
        assert len(prepare([good, bad, good], bpe, skip)) == 2
        stop = PrepareOptions("next_token", 64, **options)
        with pytest.raises(ValueError, match="row 1: the chat template refuses"):
            prepare([good, bad, good], bpe, stop)


def test_values_that_no_template_can_take_are_bad_rows(bpe):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for field in ({"tool_calls": deep}, {}):
        message = assistant("b") | field
        kwargs = {"tools": [{"a": deep}]} if not field else {}
        for render in (render_with_spans, render_chat):
            with pytest.raises(BadRow, match="nest too deeply"):
                render(bpe, [user("a"), message], kwargs)
    with pytest.raises(BadRow, match="tools must be a list of JSON objects"):
        render_chat(bpe, TWO, {"tools": ["f"]})
    with pytest.raises(BadRow, match="holds 'add_generation_prompt'"):
        render_chat(bpe, TWO, {"add_generation_prompt": True})
