import json
import sys
import types

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config import resolve
from jaxtrain.data.rows import tokenize
from jaxtrain.data.rows.encode import TextEncoder
from jaxtrain.data.rows.formats import detect_format, read_row
from jaxtrain.data.rows.tokenize import (
    Example,
    Pair,
    common_prefix_length,
    load_tokenizer,
    tokenize_examples,
    tokenize_pairs,
    truncate_example,
    truncate_pair,
)
from jaxtrain.data.sources import check_sources


def fail(index, reason):
    raise AssertionError(f"row {index}: {reason}")


def examples(rows, tokenizer, **options):
    found = detect_format(rows)
    rows = [read_row(row, found) for row in rows]
    return tokenize_examples(rows, found, tokenizer, on_bad=fail, **options)


def pairs(rows, tokenizer):
    found = detect_format(rows)
    return tokenize_pairs(
        [read_row(row, found) for row in rows], found, tokenizer, on_bad=fail
    )


def test_text_ends_with_one_eos(tokenizer):
    bare, ended = examples([{"text": "the sky"}, {"text": "the sky<|eos|>"}], tokenizer)
    assert bare.ids.tolist() == ended.ids.tolist()
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    plain = tokenizer("the sky", add_special_tokens=False)["input_ids"]
    assert bare.ids.tolist() == [*bos, *plain, tokenizer.eos_token_id]
    assert bare.trained.all()


def test_the_completion_starts_where_tokens_part(tokenizer):
    row = {"prompt": "the be", "completion": "ginning"}
    (example,) = examples([row], tokenizer)
    merged = tokenizer("the beginning<|eos|>")["input_ids"]
    assert example.ids.tolist() == merged
    assert tokenizer.decode(example.ids[example.trained]).endswith("beginning<|eos|>")
    (whole,) = examples([row], tokenizer, completion_only_loss=False)
    assert whole.trained.all()


def test_a_preference_prompt_is_the_shorter_common_prefix(tokenizer):
    row = {"prompt": "the be", "chosen": "ginning", "rejected": " face"}
    (pair,) = pairs([row], tokenizer)
    assert tokenizer.decode(pair.chosen).endswith("beginning<|eos|>")
    full = [*pair.prompt, *pair.rejected]
    assert tokenizer.decode(full).endswith("the be face<|eos|>")
    assert full == tokenizer("the be face<|eos|>")["input_ids"]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefixes_are_shared_and_longest(left, right):
    n = common_prefix_length(left, right)
    assert left[:n] == right[:n]
    assert left[n : n + 1] != right[n : n + 1] or n == len(left) == len(right)


def test_an_example_keeps_its_start_and_is_dropped_without_trained_tokens():
    example = Example(np.arange(6), np.array([0, 0, 0, 1, 1, 1], bool))
    short = truncate_example(example, 4)
    assert short.ids.tolist() == [0, 1, 2, 3] and short.trained.sum() == 1
    assert truncate_example(example, 3) is None
    assert truncate_example(example, None).ids.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_pair_keeps_the_end_of_its_prompt_and_the_start_of_completions():
    pair = Pair(np.arange(6), np.arange(10, 15), np.arange(20, 22))
    short = truncate_pair(pair, 7, 4)
    assert short.prompt.tolist() == [2, 3, 4, 5]
    assert short.chosen.tolist() == [10, 11, 12]
    assert short.rejected.tolist() == [20, 21]
    assert truncate_pair(pair, 6, None) is None  # the prompt alone fills max_length
    assert truncate_pair(pair, 7, None).chosen.tolist() == [10]
    assert truncate_pair(pair, None, None).chosen.tolist() == [10, 11, 12, 13, 14]


def test_loss_options_that_do_not_fit_the_rows_are_refused(bpe):
    with pytest.raises(
        ValueError, match="assistant_only_loss=True needs conversations"
    ):
        examples([{"text": "a"}], bpe, assistant_only_loss=True)
    with pytest.raises(ValueError, match="completion_only_loss=True needs prompt"):
        examples([{"text": "a"}], bpe, completion_only_loss=True)


def test_a_row_that_its_template_refuses_is_reported_and_left_out(bpe):
    bpe.chat_template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}x"
    )
    user = [[{"role": "user", "content": content}] for content in ("ok", "bad", "ok")]
    reply = [{"role": "assistant", "content": "yes"}]
    bad = []

    def note(index, reason):
        bad.append((index, reason))

    rows = [{"prompt": p, "completion": reply} for p in user]
    found = detect_format(rows)
    out = tokenize_examples(
        [read_row(row, found) for row in rows], found, bpe, on_bad=note
    )
    assert [example is None for example in out] == [False, True, False]
    rows = [{"prompt": p, "chosen": reply, "rejected": reply} for p in user]
    found = detect_format(rows)
    out = tokenize_pairs(
        [read_row(row, found) for row in rows], found, bpe, on_bad=note
    )
    assert [pair is None for pair in out] == [False, True, False]
    assert [index for index, _ in bad] == [1, 1]  # once for each data set


def test_a_saved_tokenizer_loads_and_pads_with_eos_if_it_must(tmp_path, bpe):
    bpe.pad_token = None
    bpe.save_pretrained(tmp_path / "t")
    loaded = load_tokenizer(str(tmp_path / "t"))
    assert loaded.pad_token_id == loaded.eos_token_id
    assert loaded("the sky")["input_ids"] == bpe("the sky")["input_ids"]


# Every class and model type that is taken at its word, and some that are not.
DECLARED = [
    (name, model_type)
    for name in ("PreTrainedTokenizerFast", "TokenizersBackend")
    for model_type in (None, "llama", "qwen3", "gemma2", "gemma3_text", "qwen2", "phi3")
] + [
    ("Qwen2Tokenizer", "qwen2"),
    ("Qwen2TokenizerFast", "qwen3"),
    ("Qwen2Tokenizer", "qwen3_moe"),
    ("Qwen2Tokenizer", "llama"),
    ("GemmaTokenizerFast", "gemma2"),
    ("GemmaTokenizer", "gemma3_text"),
]


@pytest.mark.parametrize(("name", "model_type"), DECLARED)
def test_the_class_is_the_one_that_auto_tokenizer_chooses(
    name, model_type, tmp_path, bpe
):
    bpe.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    declared = json.loads(settings.read_text()) | {"tokenizer_class": name}
    settings.write_text(json.dumps(declared))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_a_chat_template_is_given_as_text_or_file(tmp_path, bpe):
    bpe.save_pretrained(tmp_path / "t")
    text = "{{ messages[0].content }} from a file"
    (tmp_path / "t.jinja").write_text(text)
    folder = str(tmp_path / "t")
    for given_template in (text, str(tmp_path / "t.jinja")):
        loaded = load_tokenizer(folder, chat_template=given_template)
        assert loaded.chat_template == text
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(folder, chat_template="absent.jinja")


TALK = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def test_a_chat_template_is_given_by_its_name(tmp_path, bpe):
    bpe.chat_template = {"rag": TALK, "tool-use": f"T{TALK}"}
    bpe.save_pretrained(tmp_path / "t")
    folder = str(tmp_path / "t")
    for name, text in bpe.chat_template.items():
        assert load_tokenizer(folder, chat_template=name).chat_template == text
        # Before there is a tokenizer, nothing is said of what may be a name.
        run = resolve({"data": {"chat_template": name, "train": ""}})
        check_sources(run)
    with pytest.raises(ValueError, match=r"tokenizer's templates \(rag, tool-use\)"):
        load_tokenizer(folder, chat_template="rug")


@pytest.mark.parametrize(
    ("content", "other", "is_asked"),
    [
        (b"\n\x0e\n\x05<unk>", None, True),
        (b"\n\x0e\n\x05<unk>", "tokenizer.json", False),
        (b"IQ== 0\n", None, False),  # of tiktoken
    ],
)
def test_the_package_of_a_vocabulary_is_asked_for(
    content, other, is_asked, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers, "is_sentencepiece_available", lambda: False)
    (tmp_path / "tokenizer.model").write_bytes(content)
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if other is not None:
        (tmp_path / other).write_text("{")
    with pytest.raises(ValueError, match="cannot load tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert ("pip install sentencepiece" in str(caught.value)) is is_asked
    assert ("holds no tokenizer" in str(caught.value)) is not is_asked


def test_tokenizers_that_cannot_train_are_refused(tmp_path, bpe):
    bpe.eos_token = None
    bpe.save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match=r"no EOS token.*set 'eos_token'"):
        load_tokenizer(str(tmp_path / "t"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="not a folder"):
        load_tokenizer("./absent")
    with pytest.raises(ValueError, match="without network, give a local folder"):
        load_tokenizer("no/such-tokenizer")


def test_an_unknown_token_that_the_vocabulary_lacks_is_one_line(tmp_path):
    words = tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="absent")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>"
    ).save_pretrained(tmp_path)
    encoder = TextEncoder(load_tokenizer(str(tmp_path)), add_special_tokens=False)
    for encode in (encoder.encode, encoder.encode_with_offsets):
        with pytest.raises(ValueError, match="cannot encode a text"):
            encode(["a b"])


def test_a_tokenizer_class_comes_without_the_reader_of_gguf_that_imports_torch(
    monkeypatch,
):
    """As transformers 5.17 has it, until something is to be read."""
    reader = "transformers.modeling_gguf_pytorch_utils"
    for name in ("torch", reader):
        monkeypatch.delitem(sys.modules, name, raising=False)

    class Transformers:
        @property
        def Tokenizer(self):
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

            return load_gguf_checkpoint

    monkeypatch.setattr(tokenize, "transformers", Transformers())
    load = tokenize._import_class("Tokenizer")
    assert not {"torch", reader} & sys.modules.keys()
    module = types.ModuleType(reader)
    module.load_gguf_checkpoint = lambda path, whole: (path, whole)
    monkeypatch.setitem(sys.modules, reader, module)
    assert load("x.gguf", whole=True) == ("x.gguf", True)
