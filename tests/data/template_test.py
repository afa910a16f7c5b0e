import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.template import (
    mask_assistant,
    mask_tokens,
    render_chat,
    render_with_spans,
    require_chat_template,
    turn_end_id,
)
from jaxtrain.data.rows.turns import find_spans_by_beginnings

QWEN3_LIKE = (  # only a last assistant turn gets a thought
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
COUNTING = (  # every rendering says how long it is: no beginning is ever a prefix
    "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_KWARGS = {"tools": None}


def talk(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [
        {"role": role, "content": content}
        for role, content in zip(roles, contents, strict=False)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def encode_with_assistant_mask(tokenizer, messages, template_kwargs):
    text, spans = render_with_spans(tokenizer, messages, template_kwargs)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], mask_assistant(encoded["offset_mapping"], spans)


def trained_text(tokenizer, messages):
    ids, mask = encode_with_assistant_mask(tokenizer, messages, NO_KWARGS)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    return [
        tokenizer.decode([ids[i] for i in run])
        for run in runs
        if len(run) and mask[run[0]]
    ]


def test_only_assistant_turns_and_their_terminators_are_trained(tokenizer):
    messages = talk("Hello", "It is blue", "Where?", "Héllo 😀", system="You")
    assert trained_text(tokenizer, messages) == [
        "It is blue<|im_end|>\n",
        "Héllo 😀<|im_end|>\n",
    ]


def test_found_masks_equal_marked_ones(tokenizer, marked_template):
    messages = talk("Hello", "It is blue", "Where?", "the sky 😀", system="You")
    ids, found = encode_with_assistant_mask(tokenizer, messages, NO_KWARGS)
    tokenizer.chat_template = marked_template
    marked_ids, marked = encode_with_assistant_mask(tokenizer, messages, NO_KWARGS)
    assert ids == marked_ids
    np.testing.assert_array_equal(found, marked)


words = st.text("ab é😀\n ", min_size=1, max_size=8)


@given(st.lists(words, min_size=2, max_size=6))
def test_spans_hold_what_the_assistant_said(contents):
    messages = talk(*contents)

    def render(messages, *, add_generation_prompt=False):
        text = "".join(f"[{m['role']}]{m['content']}[end]" for m in messages)
        return text + "[assistant]" * add_generation_prompt

    full = render(messages)
    spans = find_spans_by_beginnings(render, messages)
    said = [f"{m['content']}[end]" for m in messages if m["role"] == "assistant"]
    assert [full[a:b] for a, b in spans] == said


def test_a_template_that_renders_the_last_turn_differently_is_still_masked(bpe):
    bpe.chat_template = QWEN3_LIKE
    assert trained_text(bpe, talk("Hi", "one", "And?", "two")) == [
        "one[end]\n",
        "<think></think>two[end]\n",
    ]


def test_tool_results_are_not_trained(tokenizer):
    messages = talk("2 times 3?", "let me see")
    messages += [
        {"role": "tool", "content": "6"},
        {"role": "assistant", "content": "6."},
    ]
    assert trained_text(tokenizer, messages) == [
        "let me see<|im_end|>\n",
        "6.<|im_end|>\n",
    ]


def test_stock_qwen3_masks_every_turn_of_a_long_conversation(qwen3):
    messages = talk("Hi", "one", "And?", "two", system="You are helpful.")
    assert trained_text(qwen3, messages) == [
        "one<|im_end|>\n",
        "<think>\n\n</think>\n\ntwo<|im_end|>\n",
    ]


def test_a_template_that_is_not_prefix_stable_is_refused(bpe):
    bpe.chat_template = COUNTING
    with pytest.raises(BadRow, match="not prefix-stable"):
        encode_with_assistant_mask(bpe, talk("a", "b", "c", "d"), NO_KWARGS)


def test_a_conversation_without_assistant_is_refused(tokenizer, marked_template):
    for template in (tokenizer.chat_template, marked_template):
        tokenizer.chat_template = template
        with pytest.raises(BadRow, match="no token is the assistant's"):
            encode_with_assistant_mask(tokenizer, talk("alone"), NO_KWARGS)


def test_a_conversation_opened_by_the_assistant_is_refused(tokenizer):
    with pytest.raises(BadRow, match="opens with the assistant"):
        encode_with_assistant_mask(tokenizer, talk("a", "b")[1:], NO_KWARGS)


def test_a_template_that_raises_makes_a_bad_row(bpe):
    bpe.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match="roles must alternate"):
        encode_with_assistant_mask(bpe, talk("a", "b"), NO_KWARGS)


def test_a_tokenizer_without_template_is_refused(bpe):
    bpe.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        require_chat_template(bpe)


def prepare_talks(tokenizer, *rows):
    options = PrepareOptions(objective="next_token", max_length=64)
    return prepare(list(rows), tokenizer, options)


def test_several_templates_without_a_default_are_one_error(bpe):
    """Rows that name a template, or have tools where one is for these, need none."""
    template, row = bpe.chat_template, {"messages": talk("a", "b")}
    bpe.chat_template = {"rag": template, "other": template}
    with pytest.raises(ValueError, match=r"no chat template called default: set"):
        prepare_talks(bpe, row, row)
    with pytest.raises(
        ValueError, match=r"data\.chat_template to a name \(other, rag\)"
    ):
        render_chat(bpe, row["messages"], NO_KWARGS)
    names = {"chat_template_kwargs": {"chat_template": "rag"}}
    assert prepare_talks(bpe, row | names).stats.rows == 1
    bpe.chat_template = {"tool_use": template}
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    assert prepare_talks(bpe, row | tools).stats.rows == 1
    with pytest.raises(ValueError, match="called default"):
        prepare_talks(bpe, row | tools, row)


def test_a_template_that_is_not_jinja_is_one_error(bpe):
    row = {"messages": talk("a", "b")}
    broken = "{% for m in messages %}\n{{ m.content }"
    own = {"chat_template_kwargs": {"chat_template": broken}}
    with pytest.raises(ValueError, match="1 of 2 rows cannot be used"):
        prepare_talks(bpe, row, row | own)  # this row's alone
    bpe.chat_template, bpe.name_or_path = broken, "some/folder"
    message = "the chat template of tokenizer 'some/folder', line 2: not Jinja"
    with pytest.raises(ValueError, match=message) as caught:
        prepare_talks(bpe, row, row)
    assert "rows" not in str(caught.value)
    assert turn_end_id(bpe) is None
    assert prepare_talks(bpe, {"text": "a"}).stats.rows == 1


def test_tokens_overlapping_a_span_are_masked():
    # "ab| cd|" with the space left out of the second token's offsets, and a character
    # of three tokens.
    offsets = [(0, 2), (3, 5), (5, 6), (5, 6), (5, 6), (6, 8)]
    assert mask_tokens(offsets, [(2, 6)]).tolist() == [0, 1, 1, 1, 1, 0]
    assert mask_tokens(offsets, [(1, 2), (6, 8)]).tolist() == [1, 0, 0, 0, 0, 1]
    assert mask_tokens([], [(0, 1)]).tolist() == []


def test_a_template_that_ends_no_turn_is_told_once(tokenizer, caplog):
    """GLM 4.5's: the next turn's role is what ends a turn."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    for _ in range(2):
        encode_with_assistant_mask(tokenizer, talk("a", "b"), NO_KWARGS)
    (line,) = [text for text in caplog.messages if "nothing behind" in text]
    assert "data.chat_template" in line
