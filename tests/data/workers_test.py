"""Preparation in several processes, in files and in batches changes no token."""

import json
import random
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.prepare import sequences, workers
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.sequences import Sequences, SequenceWriter
from jaxtrain.data.prepare.workers import Resources
from jaxtrain.data.rows.encode import TextEncoder, _cuts_of
from jaxtrain.data.rows.tokenize import Example

WORDS = ["the", "sky", "is", "blue", "and", "green", "beginning", "God", "created"]


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))


def turn(role: str, rng: random.Random) -> dict[str, str]:
    return {"role": role, "content": words(rng)}


def make_rows(kind: str, count: int) -> list[dict]:
    """Rows of which every seventh is bad, some only when they are rendered."""
    rng, rows = random.Random(kind), []
    for number in range(count):
        bad = number % 7 == 3
        if kind == "messages":
            turns = [turn(r, rng) for r in ("user", "assistant") * rng.randint(1, 3)]
            rows.append({"messages": turns[: 1 if bad else None]})
        elif kind == "preference":
            row = {"prompt": [turn("user", rng)]}
            row |= {side: [turn("assistant", rng)] for side in ("chosen", "rejected")}
            rows.append(row | ({"chosen": None} if bad else {}))
        else:
            text = {"prompt": words(rng), "completion": words(rng)}
            rows.append(text | ({"completion": None} if bad else {}))
            rows[-1] |= {"label": rng.random() < 0.5, "hard": rng.random()}
    return rows


OPTIONS = {
    "messages": {"objective": "next_token", "assistant_only_loss": True},
    "preference": {"objective": "preference", "packing": "bfd"},
    "labeled": {"objective": "labeled", "difficulty_column": "hard"},
}


def options_of(kind: str, **more) -> PrepareOptions:
    given = {"max_length": 64, "on_bad_row": "skip", "batch_size": 5}
    return PrepareOptions(**(given | OPTIONS[kind] | more))


@pytest.fixture
def only_workers(monkeypatch):
    """Every chunk but the first is made by another process; gives those made here."""
    made_here = []

    def is_busy(pool) -> bool:
        until = time.monotonic() + 60
        while pool._ready < pool.count and time.monotonic() < until:
            time.sleep(0.01)
        return False

    def make_chunk(rows, first, recipe):
        made_here.append(first)
        return original(rows, first, recipe)

    original = workers.make_chunk
    monkeypatch.setattr(workers._Pool, "is_busy", property(is_busy))
    monkeypatch.setattr(workers, "make_chunk", make_chunk)
    return made_here


MANY = Resources(processes=3, worth_secs=-1)


def test_processes_change_nothing(bpe, only_workers, caplog, tmp_path):
    for kind in OPTIONS:
        rows = make_rows(kind, 43)
        alone = prepare(rows, bpe, options_of(kind))
        (told,) = [r.message for r in caplog.records if "skipped" in r.message]
        caplog.clear()
        only_workers.clear()
        if kind == "preference":  # which the others read from the disk
            datasets.Dataset.from_list(rows).save_to_disk(tmp_path / kind)
            rows = datasets.load_from_disk(tmp_path / kind)
        many = prepare(rows, bpe, options_of(kind), resources=MANY)
        assert only_workers == [0]
        assert many.fingerprint == alone.fingerprint and many.stats == alone.stats
        assert told in caplog.text and "row 3: " in told and "row 10: " in told
        assert alone.stats.bad_rows == 6
        np.testing.assert_array_equal(many.difficulty, alone.difficulty)
        caplog.clear()
    with pytest.raises(ValueError, match="row 3: completion is None") as refused:
        options = options_of("labeled", on_bad_row="error")
        prepare(rows := make_rows("labeled", 43), bpe, options, resources=MANY)
    with pytest.raises(ValueError) as alone_refused:
        prepare(rows, bpe, options)
    assert str(refused.value) == str(alone_refused.value)


def test_chunks_of_processes_that_die_are_made_here(
    bpe, only_workers, caplog, monkeypatch
):
    def submit(pool, *arguments):
        future = original(pool, *arguments)
        for process in pool._started:
            process.kill()
        return future

    original = workers._Pool.submit
    monkeypatch.setattr(workers._Pool, "submit", submit)
    rows = make_rows("preference", 43)
    many = prepare(rows, bpe, options_of("preference"), resources=MANY)
    assert "one died" in caplog.text and len(only_workers) > 5
    alone = prepare(rows, bpe, options_of("preference"))
    assert many.fingerprint == alone.fingerprint


def test_processes_that_cannot_start_are_done_without(bpe, caplog, monkeypatch):
    def is_busy(pool) -> bool:
        for thread in pool._threads:
            thread.join(60)
        return original.fget(pool)

    original = workers._Pool.is_busy
    monkeypatch.setattr(workers._Pool, "is_busy", property(is_busy))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    rows = make_rows("labeled", 43)
    made = prepare(rows, bpe, options_of("labeled"), resources=MANY)
    assert "one did not start: FileNotFoundError" in caplog.text
    assert made.fingerprint == prepare(rows, bpe, options_of("labeled")).fingerprint


def test_few_rows_start_no_process(bpe, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    rows = make_rows("labeled", 43)
    prepare(rows, bpe, options_of("labeled"), resources=Resources(processes=8))


PROGRAM = """
import json, pathlib, sys, time
import jax
jax.numpy.zeros(3).block_until_ready()  # starts threads
from jaxtrain.data.prepare import workers
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.tokenize import load_tokenizer
def is_busy(pool):
    while not pool._ready:
        time.sleep(0.01)
    return False
workers._Pool.is_busy = property(is_busy)
folder = pathlib.Path(sys.argv[1])
made = prepare(
    json.loads((folder / "rows.json").read_text()),
    load_tokenizer(str(folder)),
    PrepareOptions(**json.loads((folder / "options.json").read_text())),
    resources=workers.Resources(processes=2, worth_secs=-1),
)
print(made.fingerprint)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(bpe, tmp_path):
    rows = make_rows("messages", 43)
    given = {"max_length": 64, "on_bad_row": "skip", "batch_size": 5}
    given |= OPTIONS["messages"]
    bpe.save_pretrained(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "options.json").write_text(json.dumps(given))
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = prepare(rows, bpe, PrepareOptions(**given)).fingerprint
    assert ran.stdout.split() == [expected], ran.stderr
    assert "Traceback" not in ran.stderr and "fewer processes" not in ran.stderr


# --- sequences in files ------------------------------------------------------------


def test_sequences_in_a_file_are_those_in_memory(tmp_path, monkeypatch, bpe):
    rng = np.random.default_rng(0)
    blocks = [
        [
            Example(rng.integers(0, 99, n, np.int32), rng.random(n) < 0.5)
            for n in rng.integers(0, 9, count)
        ]
        for count in (4, 0, 7, 1, 12)
    ]
    for held in (1 << 20, 1, 40):
        monkeypatch.setattr(sequences, "_HELD_BYTES", held)
        writer = SequenceWriter(tmp_path)
        for block in blocks:
            writer.append(Sequences.of(block))
        found = list(writer.finish())
        every = [example for block in blocks for example in block]
        assert len(found) == len(every)
        for ours, theirs in zip(found, every, strict=True):
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            np.testing.assert_array_equal(ours.trained, theirs.trained)
    assert not list(tmp_path.iterdir())  # a file without a name is no litter
    rows = make_rows("labeled", 43)
    in_files = prepare(rows, bpe, options_of("labeled"))
    monkeypatch.setattr(sequences, "_HELD_BYTES", 1 << 20)
    assert in_files.fingerprint == prepare(rows, bpe, options_of("labeled")).fingerprint


# --- what texts begin with is tokenized once ---------------------------------------


def awkward(tokenizer, *, added=(), first=False):
    """A tokenizer whose pre-tokenizer or added tokens look around."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if first:
        vocabulary = {chr(n): n for n in range(32, 127)} | {"▁": 200, "<unk>": 201}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.normalizer = normalizers.Strip()
        backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def special(content, **options):
    return AddedToken(content, special=True, normalized=False, **options)


AWKWARD = {
    "plain": {},
    "only the first piece is prefixed": {"first": True},
    "overlaps": {"added": [special("\n<|im_start|>"), special("x<|im_e")]},
    "is longer": {"added": [special("<|im_start|>assistant")]},
    "takes space on the left": {"added": [special("<|im_start|>a", lstrip=True)]},
    "takes space on the right": {"added": [special("sky", rstrip=True)]},
    "stands alone": {"added": [special("sky", single_word=True)]},
    "is normalized": {"added": [AddedToken("blue<|im", normalized=True)]},
}
PIECES = [
    "<|im_start|>", "<|im_end|>", "<|im_", "assistant", "a", "x", "\n", " ", "  ",
    "sky", "the sky", " blue", "beginning", "é😀", " <|im_start|>assistant",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.fixture(scope="session", params=[*AWKWARD, "embedded", "qwen3"])
def looked_around(request, small):
    if request.param == "qwen3":
        return request.getfixturevalue("qwen3")
    if request.param == "embedded":
        from jaxtrain import assets
        from jaxtrain.data.rows.tokenize import load_tokenizer

        return load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))
    return awkward(small, **AWKWARD[request.param])


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(prompt=texts, endings=st.lists(texts, min_size=1, max_size=3))
def test_texts_that_begin_alike_have_the_tokens_of_each(prompt, endings, looked_around):
    row = [prompt, *(prompt + ending for ending in endings)]
    encoder = TextEncoder(looked_around, add_special_tokens=False)
    found, other = encoder.encode_alike([row, ["the sky"]])
    plain = looked_around(row, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in found] == plain
    whole = TextEncoder(looked_around, add_special_tokens=True).encode(row)
    assert [ids.tolist() for ids in whole] == looked_around(row)["input_ids"]
    assert [ids.tolist() for ids in other] == looked_around(
        ["the sky"], add_special_tokens=False
    )["input_ids"]


def test_the_prompt_of_a_pair_is_tokenized_once(bpe, caplog, monkeypatch):
    assert "<|im_start|>" in _cuts_of(bpe)
    tokenized = []
    encode = TextEncoder.encode

    def note(self, texts):
        tokenized.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", note)
    prompt = [{"role": "user", "content": "Where is the sun?"}]
    sides = [[{"role": "assistant", "content": word}] for word in ("Here.", "There.")]
    row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    prepare([row], bpe, options_of("preference"))
    assert sum("Where is the sun?" in text for text in tokenized) == 1
