"""The embedded assets: small, well formed, held out, and rebuilt byte for byte."""

import collections
import gzip
import json
import pathlib
import shutil
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoTokenizer

from jaxtrain import assets
from tests.embedded import build, pairs, passages
from tests.embedded.passages import Verse

TEXT_TRAIN, TEXT_EVAL = assets.DATA["next_token"]
SFT_TRAIN, SFT_EVAL = assets.DATA["sft"]
MESSAGES_TRAIN, MESSAGES_EVAL = assets.DATA["messages"]
PREFERENCE_TRAIN, PREFERENCE_EVAL = assets.DATA["preference"]
FILES = [name for files in assets.DATA.values() for name in files]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.asset_path(assets.TOKENIZER))


def read_rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(assets.asset_path(name), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def long_verses(name: str) -> set[str]:
    """The verses of a file that are long enough not to be a recurring formula.

    A verse that a prompt begins and an answer ends counts as one.
    """
    texts = []
    for row in read_rows(name):
        if "text" in row:
            texts.append(row["text"])
        elif "messages" in row:
            texts += [message["content"] for message in row["messages"]]
        else:
            texts.append(row["prompt"] + row.get("completion", row.get("chosen")))
    return {
        line
        for text in texts
        for line in text.split("\n")
        if len(line) >= passages.REPEATED_VERSE_CHARS
    }


# What is in the package.


def test_all_assets_together_are_smaller_than_the_limit() -> None:
    files = [file for file in build.PACKAGE_DIR.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < assets.SIZE_LIMIT_BYTES


def test_the_model_is_a_small_decoder_with_the_embedded_tokenizer() -> None:
    model = assets.asset_path(assets.MODEL)
    config = AutoConfig.from_pretrained(model)
    tokenizer_dir = assets.asset_path(assets.TOKENIZER)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    assert config.vocab_size == 2048
    assert (model / "model.safetensors").stat().st_size < 5 * 2**20


def test_an_unknown_asset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'data/nothing'.*use one of.*data/text"):
        assets.asset_path("data/nothing")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (SFT_TRAIN, 4000),
        (SFT_EVAL, 256),
        (MESSAGES_TRAIN, 256),
        (MESSAGES_EVAL, 64),
        (PREFERENCE_TRAIN, 4000),
        (PREFERENCE_EVAL, 256),
    ],
)
def test_each_file_of_pairs_has_as_many_rows_as_asked_for(name: str, rows: int) -> None:
    assert len(read_rows(name)) == rows


@pytest.mark.parametrize("name", FILES)
def test_every_row_has_the_columns_of_its_form_and_no_empty_one(name: str) -> None:
    columns = {
        "text": {"text"},
        "sft": {"prompt", "completion"},
        "messages": {"messages"},
        "preference": {"prompt", "chosen", "rejected"},
    }[name.split("/")[1]]
    for row in read_rows(name):
        assert set(row) == columns
        assert all(row.values())


@pytest.mark.parametrize("name", [TEXT_TRAIN, TEXT_EVAL])
def test_a_passage_and_its_end_token_fit_in_256_tokens(
    name: str, tokenizer: Any
) -> None:
    texts = sorted((row["text"] for row in read_rows(name)), key=len)[-1500:]
    assert max(map(len, tokenizer(texts).input_ids)) + 1 <= 256


def test_no_row_of_any_training_file_stands_in_an_eval_file() -> None:
    for train, held_out in assets.DATA.values():
        rows = {json.dumps(row) for row in read_rows(train)}
        assert not rows & {json.dumps(row) for row in read_rows(held_out)}


def test_no_verse_of_any_eval_file_stands_in_any_training_file() -> None:
    train = set().union(*(long_verses(name) for name, _ in assets.DATA.values()))
    held_out = set().union(*(long_verses(name) for _, name in assets.DATA.values()))
    assert len(held_out) > 1000
    assert not train & held_out


def test_every_training_pair_is_of_verses_that_the_text_has() -> None:
    text = long_verses(TEXT_TRAIN)
    for name in (SFT_TRAIN, PREFERENCE_TRAIN):
        assert long_verses(name) <= text


# Supervised and preference rows.


def test_sft_rows_ask_for_three_kinds_of_answer_all_of_them_often() -> None:
    rows = read_rows(SFT_TRAIN)
    tasks = collections.Counter(row["prompt"].split("\n")[0] for row in rows)
    assert set(tasks) == {pairs.CONTINUE, pairs.NEXT, pairs.NAME}
    assert min(tasks.values()) > 1000
    names = [row for row in rows if row["prompt"].startswith(pairs.NAME)]
    assert {row["completion"] for row in names} <= set(passages.BOOKS.values())


def test_prompt_tokens_are_a_prefix_of_the_tokens_with_the_answer(
    tokenizer: Any,
) -> None:
    for name, answers in (
        (SFT_EVAL, ["completion"]),
        (PREFERENCE_EVAL, ["chosen", "rejected"]),
    ):
        for row in read_rows(name):
            prompt = tokenizer(row["prompt"]).input_ids
            for answer in answers:
                whole = tokenizer(row["prompt"] + row[answer]).input_ids
                assert whole[: len(prompt)] == prompt
                assert len(whole) > len(prompt)


@pytest.mark.parametrize("name", [PREFERENCE_TRAIN, PREFERENCE_EVAL])
def test_chosen_and_rejected_are_equally_long_on_average(
    name: str, tokenizer: Any
) -> None:
    rows = read_rows(name)
    chosen, rejected = (
        np.array([len(ids) for ids in tokenizer([row[side] for row in rows]).input_ids])
        for side in ("chosen", "rejected")
    )
    assert abs(chosen.mean() / rejected.mean() - 1) < 0.02
    # Neither "the longer wins" nor "the shorter wins" beats a coin by much.
    assert abs(np.mean(chosen > rejected) - np.mean(chosen < rejected)) < 0.1


def test_a_rejected_answer_is_of_one_of_four_kinds_equally_often() -> None:
    kinds: collections.Counter[str] = collections.Counter()
    for row in read_rows(PREFERENCE_TRAIN):
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        assert chosen != rejected
        assert row["rejected"].startswith(" ")
        lengths = [len(word) for word in chosen]
        if sorted(chosen) == sorted(rejected):
            kinds["shuffled"] += 1
        elif lengths == [len(word) for word in rejected]:
            kinds["replaced"] += 1
        elif len(set(rejected)) <= 4 and set(rejected) <= set(chosen):
            kinds["repeated"] += 1
        else:
            kinds["unrelated"] += 1
    assert min(kinds.values()) > 900, kinds


# The tokenizer and its chat template.


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_has_one_stop_token_and_a_pad_token_of_its_own(
    tokenizer: Any,
) -> None:
    assert len(tokenizer) == 2048
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert tokenizer.bos_token is None
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]
    assert tokenizer("").input_ids == []


def test_the_tokenizer_packs_held_out_text_in_a_third_of_its_bytes(
    tokenizer: Any,
) -> None:
    texts = [row["text"] for row in read_rows(TEXT_EVAL)]
    tokens = sum(map(len, tokenizer(texts).input_ids))
    assert sum(map(len, texts)) / tokens > 3.5


contents = st.text(string.ascii_letters + " \n", max_size=12)
conversations = st.builds(
    lambda system, turns: system + [message for turn in turns for message in turn],
    st.lists(
        st.builds(lambda text: {"role": "system", "content": text}, contents),
        max_size=1,
    ),
    st.lists(
        st.tuples(
            st.builds(lambda text: {"role": "user", "content": text}, contents),
            st.builds(lambda text: {"role": "assistant", "content": text}, contents),
        ),
        min_size=1,
        max_size=3,
    ),
)
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"verse": "string"}},
}


@given(messages=conversations, tools=st.sampled_from([None, [TOOL]]))
def test_the_template_renders_a_beginning_as_a_prefix_of_the_whole(
    tokenizer: Any, messages: list[dict[str, str]], tools: list[Any] | None
) -> None:
    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=prompt
        )

    whole = render(len(messages), False)
    for count in range(1, len(messages)):
        assistant_next = messages[count]["role"] == "assistant"
        assert whole.startswith(render(count, assistant_next))


@given(messages=conversations)
def test_the_template_marks_the_answers_and_their_stop_tokens(
    tokenizer: Any, messages: list[dict[str, str]]
) -> None:
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, mark in zip(out["input_ids"], out["assistant_masks"], strict=True)
        if mark
    ]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(marked) == "".join(a + "<|im_end|>" for a in answers)


def test_the_template_renders_this_conversation_so(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
            {"role": "assistant", "content": "Moses"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMoses<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_template_renders_tools_calls_and_their_results(tokenizer: Any) -> None:
    call = {"function": {"name": "look_up", "arguments": {"verse": "John 3:16"}}}
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Read it."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "For God so loved"},
        ],
        tools=[TOOL],
        tokenize=False,
    )
    assert text.count("<|im_start|>system\n") == 1
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    schema = text.split("a line:\n")[1].split("\n")[0]
    assert json.loads(schema) == TOOL
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>{"name": "look_up", "arguments": '
        '{"verse": "John 3:16"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nFor God so loved<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "critic", "content": "No."}], "unknown role critic"),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            "must be the first message",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "text parts only"),
    ],
)
def test_the_template_refuses_what_it_cannot_render(
    tokenizer: Any, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(TemplateError, match=reason):
        tokenizer.apply_chat_template(messages, tokenize=False)


# How they are built.


def test_a_rebuild_gives_the_same_bytes(
    shared_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    build.main(
        [
            *("--source", str(shared_directory / "data" / "kjv.txt.gz")),
            *("--output", str(tmp_path)),
        ]
    )
    built = {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")}
    assert built >= {pathlib.Path(name) for name in FILES}
    for name in built:
        assert (tmp_path / name).read_bytes() == (
            build.PACKAGE_DIR / name
        ).read_bytes(), name


def test_a_gzip_file_holds_neither_a_time_nor_a_name(tmp_path: pathlib.Path) -> None:
    build.write_jsonl_gz(tmp_path / "rows.jsonl.gz", [{"text": "é"}])
    written = (tmp_path / "rows.jsonl.gz").read_bytes()
    assert written[3:8] == bytes(5)  # RFC 1952: FLG, then MTIME
    assert gzip.decompress(written).decode() == '{"text": "é"}\n'


def write_verses(path: pathlib.Path, lines: str) -> pathlib.Path:
    path.write_bytes(gzip.compress(lines.encode()))
    return path


def test_a_verse_is_read_with_its_book_chapter_and_number(
    tmp_path: pathlib.Path,
) -> None:
    source = write_verses(tmp_path / "v.gz", "1Sm12:3 Behold, here I am:\n")
    assert passages.read_verses(source) == [
        Verse("1 Samuel", 12, 3, "Behold, here I am:")
    ]


@pytest.mark.parametrize("line", ["Genesis one", "Foo1:1 In the beginning"])
def test_a_line_that_is_no_verse_is_refused_with_its_row(
    tmp_path: pathlib.Path, line: str
) -> None:
    source = write_verses(tmp_path / "v.gz", f"Ge1:1 In the beginning\n{line}\n")
    with pytest.raises(ValueError, match=r"v\.gz:2: .*should read like"):
        passages.read_verses(source)


def test_a_held_out_verse_that_training_repeats_is_left_out() -> None:
    chapters = [Verse("Isaiah", number, 1, "") for number in range(1, 67)]
    out = next(v.chapter for v in chapters if passages.is_held_out(v))
    kept = next(v.chapter for v in chapters if not passages.is_held_out(v))
    parallel = "x" * passages.REPEATED_VERSE_CHARS
    train, held_out = passages.split_chapters(
        [
            Verse("Isaiah", kept, 1, parallel),
            Verse("Isaiah", kept, 2, "short"),
            Verse("Isaiah", out, 1, "first"),
            Verse("Isaiah", out, 2, parallel),
            Verse("Isaiah", out, 3, "short"),
            Verse("Isaiah", out, 4, "last"),
        ]
    )
    assert [[v.text for v in run] for run in train] == [[parallel, "short"]]
    assert [[v.text for v in run] for run in held_out] == [["first"], ["short", "last"]]


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_passages_hold_every_verse_once_in_order_within_the_limit(
    lengths: list[int],
) -> None:
    run = [Verse("Job", 1, n, "x" * length) for n, length in enumerate(lengths)]
    made = list(passages.make_passages(run))
    assert "\n".join(made).split("\n") == [verse.text for verse in run]
    assert all(len(passage) <= passages.PASSAGE_CHARS for passage in made)


@pytest.fixture
def export(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with the files of an export; the weights are no real ones."""
    directory = tmp_path / "export"
    shutil.copytree(assets.asset_path(assets.TOKENIZER), directory)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (directory / name).write_bytes(b"{}")
    return directory


@pytest.fixture
def output(tmp_path: pathlib.Path) -> pathlib.Path:
    directory = tmp_path / "package"
    shutil.copytree(assets.asset_path(assets.TOKENIZER), directory / assets.TOKENIZER)
    return directory


def test_an_exported_model_is_copied_into_the_package(
    export: pathlib.Path, output: pathlib.Path
) -> None:
    (export / "training_log.txt").write_text("not part of a model")
    build.main(["--model", str(export), "--output", str(output)])
    copied = {file.name for file in (output / assets.MODEL).iterdir()}
    tokenizer_files = {file.name for file in (output / assets.TOKENIZER).iterdir()}
    assert copied == set(build.MODEL_FILES) | tokenizer_files


def test_a_model_that_is_incomplete_or_too_large_or_of_other_tokens_is_refused(
    export: pathlib.Path, output: pathlib.Path
) -> None:
    with (export / "model.safetensors").open("wb") as weights:
        weights.truncate(assets.SIZE_LIMIT_BYTES)
    with pytest.raises(ValueError, match="export it in bfloat16"):
        build.copy_model(export, output)
    (export / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(ValueError, match="another tokenizer"):
        build.copy_model(export, output)
    (export / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks \['config\.json'\]"):
        build.copy_model(export, output)
    assert not (output / assets.MODEL).exists()
