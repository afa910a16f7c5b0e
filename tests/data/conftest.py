"""Tokenizers and rows that the data tests share."""

import pathlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jaxtrain import assets

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form, and void; and darkness was upon the face.",
    "What color is the sky? It is blue. It is green. Where is the sun?",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "user assistant system tool You are a helpful assistant. Hello there!",
]

# Plain ChatML, with BOS if the tokenizer has one. It is prefix-stable.
CHAT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% if tools %}{{ '<|im_start|>system\\n' }}{{ tools | tojson }}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] if message['content'] else '' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same text, with the assistant's marked.
MARKED_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(
    *, bos: bool, pad: bool, eos: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens."""
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>" if bos else None,
        eos_token="<|eos|>" if eos else None,
        pad_token="<|pad|>" if pad else None,
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(params=["bos", "no bos, no pad"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """A small tokenizer, with BOS and pad, and with neither."""
    has_both = request.param == "bos"
    return train_tokenizer(bos=has_both, pad=has_both)


@pytest.fixture
def bpe() -> PreTrainedTokenizerBase:
    return train_tokenizer(bos=True, pad=True)


@pytest.fixture(scope="session")
def small() -> PreTrainedTokenizerBase:
    """The small tokenizer with BOS and pad, one for all tests: leave it as it is."""
    return train_tokenizer(bos=True, pad=True)


@pytest.fixture(scope="session")
def qwen3(shared_directory: pathlib.Path) -> PreTrainedTokenizerBase:
    folder = shared_directory / "tokenizers" / "qwen3"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(params=["bos", "no bos, no pad", "embedded", "qwen3"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The small tokenizers, the embedded one, and Qwen3's."""
    if request.param == "qwen3":
        return request.getfixturevalue("qwen3")
    if request.param == "embedded":
        folder = assets.asset_path(assets.TOKENIZER)
        return AutoTokenizer.from_pretrained(str(folder))
    has_both = request.param == "bos"
    return train_tokenizer(bos=has_both, pad=has_both)


@pytest.fixture
def marked_template() -> str:
    return MARKED_TEMPLATE
