import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.data.rows.formats import (
    BadRow,
    RowProblems,
    UnreadableRow,
    detect_for,
    detect_format,
    extract_prompt,
    read_row,
)

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yo"}
OTHER = {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    ("row", "kind", "conversational", "implicit"),
    [
        ({"text": "a"}, "text", False, False),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", False, False),
        ({"prompt": [USER], "completion": [REPLY]}, "prompt_completion", True, False),
        ({"messages": [USER, REPLY]}, "messages", True, False),
        ({"messages": [USER, REPLY], "prompt": "hi"}, "messages", True, False),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", False, False),
        ({"chosen": "ab", "rejected": "ac"}, "preference", False, True),
        (
            {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
            "preference", True, False,
        ),
        (
            {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            "preference", True, True,
        ),
        (  # the prompt's string repeats the first turn
            {"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            "preference", True, True,
        ),
        ({"prompt": "hi", "chosen": [REPLY], "rejected": [OTHER]},
         "preference", True, False),
        ({"instruction": "a", "input": "", "output": "b"},
         "prompt_completion", True, False),
    ],
)  # fmt: skip
def test_formats_are_told_from_the_columns(row, kind, conversational, implicit):
    found = detect_format([row])
    assert (found.kind, found.conversational) == (kind, conversational)
    assert found.implicit_prompt == implicit


def test_the_report_names_the_format_and_its_columns():
    found = detect_format(
        datasets.Dataset.from_list([{"chosen": "ab", "rejected": "c"}])
    )
    assert found.describe() == (
        "plain preference rows from columns chosen, rejected, prompt implicit in "
        "chosen/rejected"
    )


def test_unknown_columns_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"answer.*question.*rename its columns"):
        detect_format([{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="no rows"):
        detect_format([])


def read(row):
    return read_row(row, detect_format([row]))


def test_alpaca_rows_become_a_conversation_whose_output_is_the_completion():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count."}
    assert read(row) == {
        "prompt": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": "Add.\n\n1 2"},
        ],
        "completion": [{"role": "assistant", "content": "3"}],
        "template_kwargs": {"tools": None},
    }


def test_sharegpt_roles_become_chat_roles():
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("observation", "o")]
    row = {"conversations": [{"from": f, "value": v} for f, v in turns]}
    assert [(m["role"], m["content"]) for m in read(row)["messages"]] == [
        ("system", "s"), ("user", "h"), ("assistant", "g"), ("tool", "o"),
    ]  # fmt: skip


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_function_call_of_sharegpt_is_a_tool_call(as_list, as_text):
    """It was trained as the text of an answer, by another form than templates have."""
    call = {"name": "add", "arguments": {"a": 1}}
    value = [call, call] if as_list else call
    value = json.dumps(value) if as_text else value
    turns = [("human", "h"), ("function_call", value), ("observation", "2")]
    row = {"conversations": [{"from": f, "value": v} for f, v in turns]}
    called = {"type": "function", "function": call}
    assert read(row)["messages"] == [
        {"role": "user", "content": "h"},
        {"role": "assistant", "tool_calls": [called] * (1 + as_list)},
        {"role": "tool", "content": "2"},
    ]


def test_sharegpt_preference_rows_are_read():
    row = {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yo"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    read_back = read(row)
    assert read_back["prompt"] == [USER]
    assert (read_back["chosen"], read_back["rejected"]) == ([REPLY], [OTHER])


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_a_conversation_may_be_the_text_of_its_json(name, keys):
    """As in a CSV file, or where a tool wrote all columns as texts."""
    turns = [dict(zip(keys, turn.values(), strict=True)) for turn in (USER, REPLY)]
    assert read({name: json.dumps(turns)}) == read({name: turns})
    assert detect_format([{name: json.dumps(turns)}]) == detect_format([{name: turns}])


def test_a_string_prompt_beside_conversations_is_their_first_turn():
    full = {"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}
    bare = {"prompt": "hi", "chosen": [REPLY], "rejected": [OTHER]}
    assert read(full) == read(bare)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is green", "The sky is"),  # the space moves
        ("sunrise", "sunset", "sun"),
        ("abc", "abcdef", "ab"),  # the last character stays in the completion
        ("x ", "y", ""),
    ],
)
def test_the_implicit_prompt_is_the_common_prefix(chosen, rejected, prompt):
    assert chosen[: extract_prompt(chosen, rejected)] == prompt


@given(st.text("ab ", min_size=1), st.text("ab ", min_size=1))
def test_an_extracted_prompt_is_shared_and_leaves_completions(chosen, rejected):
    cut = extract_prompt(chosen, rejected)
    assert chosen[:cut] == rejected[:cut]
    assert chosen[cut:] and rejected[cut:]


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ({"text": "a"}, {"text": None}, "text is None"),
        ({"text": "a"}, {"text": ""}, "text is empty"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "completion is None"),
        ({"messages": [USER]}, {"messages": []}, "non-empty message list"),
        ({"messages": [USER]},
         {"messages": [USER, {"from": "function_call", "value": "add(1)"}]},
         r"messages\[1\] is a function_call of 'add\(1\)', expected JSON"),
        ({"messages": [USER]}, {"messages": str([USER])}, "not Python's text of it"),
        ({"messages": [USER]}, {"messages": '["a"]'}, r"messages\[0\] is 'a'"),
        ({"messages": [USER]}, {"messages": [{"role": "narrator", "content": "x"}]},
         r"messages\[0\] has role 'narrator'"),
        ({"messages": [USER]}, {"messages": [{"role": "user", "content": None}]},
         "neither content nor tool_calls"),
        ({"messages": [USER]},
         {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text"),
        ({"messages": [USER]}, {"messages": [USER], "tools": "{"}, "tools is not JSON"),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
         {"chosen": [USER], "rejected": [REPLY]}, "share no first message"),
        ({"chosen": "a", "rejected": "b"}, {"chosen": "", "rejected": "b"}, "is empty"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_with_a_reason(good, bad, reason):
    with pytest.raises(BadRow, match=reason):
        read_row(bad, detect_format([good]))


GOOD = [
    {"text": "a"},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": [USER], "completion": [REPLY], "tools": [], "chat_template_kwargs": {}},
    {"messages": [USER, REPLY], "system": "s"},
    {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"input_ids": [1, 2], "labels": [1, 2]},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "type", "text", "tools"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(st.sampled_from(GOOD), st.data())
def test_no_row_raises_anything_but_bad_row(good, data):
    row = dict(good)
    for name in data.draw(st.sets(st.sampled_from(sorted(row)), min_size=1)):
        value = row[name]
        inside = isinstance(value, list) and value and data.draw(st.booleans())
        changed = data.draw(JSON)
        row[name] = [*value[:-1], changed] if inside else changed
    try:
        read_row(row, detect_format([good]))
    except BadRow as bad:
        assert str(bad)
    for first in (row, {}, "no row", None):  # nor does a bad row in front
        assert detect_format([first, good, good]) == detect_format([good])
    with pytest.raises(BadRow):
        read_row("no row", detect_format([good]))


def test_history_that_is_none_is_a_bad_row():
    good = {"instruction": "a", "output": "b", "history": []}
    for history in (7, "ab", {"a": "b"}, ["ab"], [["a"]], [["a", 7]]):
        with pytest.raises(BadRow, match="history"):
            read_row(good | {"history": history}, detect_format([good]))


def test_the_form_is_that_of_most_rows():
    turns = {"prompt": [USER], "completion": [REPLY]}
    texts = {"prompt": "a", "completion": "b"}
    assert detect_format([texts, turns, turns]).conversational
    assert not detect_format([turns, texts, texts]).conversational
    assert detect_format([turns, texts]).conversational  # of as many, the first


def test_lines_that_hold_no_row_are_named_in_place_of_columns():
    bad = [UnreadableRow("is not JSON", f"a.jsonl line {n}") for n in (1, 2)]
    with pytest.raises(
        ValueError, match=r"none of the first 2 rows can be read: a.jsonl line 1: is no"
    ):
        detect_format(bad)
    assert detect_format([*bad, {"text": "a"}]).kind == "text"
    with pytest.raises(
        ValueError, match="none of the first 2 rows can be read: 'a' is"
    ):
        detect_format(["a", "b"])


def test_bad_rows_are_reported_together():
    problems = RowProblems("error", shown=2)
    for row in (3, 8, 9):
        problems.add(row, "text is None")
    with pytest.raises(
        ValueError, match=r"3 of 10 rows.*row 3: text.*row 8:.*; \.\.\."
    ):
        problems.report(10)
    with pytest.raises(ValueError, match="on_bad_row='ignore'"):
        RowProblems("ignore")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": [USER], "completion": [REPLY], "label": True},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
    ],
)
def test_a_system_column_is_the_first_message_of_every_conversation(row):
    found = detect_format([row])
    message = {"role": "system", "content": "Be kind."}
    read = read_row(row | {"system": "Be kind."}, found)
    assert read["prompt"] == [message, USER]
    assert read_row(row | {"system": ""}, found)["prompt"] == [USER]


def test_a_system_column_beside_plain_text_is_said_to_be_unread(caplog):
    # Columns of no other test: of the same ones it is said once.
    row = {"prompt": "a", "completion": "b", "beside_system": 1}
    detect_format([row | {"system": None}])
    assert not caplog.records
    for _ in range(2):
        detect_format([row | {"system": "Be kind."}])
    assert caplog.text.count("column 'system' is not read") == 1


def test_labels_beside_prompts_are_said_to_be_of_kto():
    row = {"prompt": "hi", "completion": " there", "label": True}
    with pytest.raises(ValueError, match=r"'label', set training.objective = 'kto'"):
        detect_for("preference", [row])
    del row["label"]
    with pytest.raises(ValueError, match="cannot train on") as caught:
        detect_for("preference", [row])
    assert "set training.objective" not in str(caught.value)


def test_sft_takes_the_messages_of_a_preference_set():
    """UltraFeedback has both, and was refused for its pairs."""
    sides = {"chosen": [USER, REPLY], "rejected": [USER, OTHER]}
    row = {"prompt": "hi", **sides, "messages": [USER, REPLY], "score_chosen": 8.5}
    assert detect_for("next_token", [row]).kind == "messages"
    assert detect_for("preference", [row]).kind == "preference"
    with pytest.raises(ValueError, match="cannot train on conversational preference"):
        detect_for("next_token", [{"prompt": "hi", **sides}])
