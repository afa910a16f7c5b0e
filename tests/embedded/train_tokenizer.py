"""Train the embedded byte-level BPE tokenizer and write it as a Hugging Face folder."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048  # a multiple of 64, so the unembedding tiles without padding
MODEL_MAX_LENGTH = 1024  # tokens
PAD_TOKEN = "<|pad|>"
TURN_START_TOKEN = "<|im_start|>"
# One token ends a document, a completion and a chat turn, so that generation has one
# stop token whatever the model was trained on. Padding has its own token: a trainer
# that masks pads by id can then never unlearn the stop.
EOS_TOKEN = "<|im_end|>"

_CHAT_TEMPLATE = pathlib.Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens.

    Any string survives a round trip. No normalizer, no added prefix space and no
    post-processor: a text's ids are those of its bytes, and nothing (no BOS) is added.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD_TOKEN, TURN_START_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    """Write what `transformers.AutoTokenizer.from_pretrained(directory)` reads.

    The config is written here, not by transformers, so that the bytes do not depend on
    its version.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": PAD_TOKEN,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": _CHAT_TEMPLATE.read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
