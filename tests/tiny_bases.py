"""Directories of tiny random models as publishers lay them out, for tests."""

import json
import pathlib
from typing import Any

SPECIAL = ("<|eos|>", "<|im_start|>", "<|im_end|>")
# ChatML, with BOS nowhere.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_tokenizer(*more: str, eos: str = "<|im_end|>", pad: str | None = None) -> Any:
    """One byte, one token, after the special tokens (ids 0, 1, 2) and `more`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *more, *alphabet]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, special=True) for w in SPECIAL])
    tokenizer.add_tokens([AddedToken(w, special=False) for w in more])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        chat_template=TEMPLATE,
    )


def write_base(
    path: pathlib.Path,
    tokenizer: Any,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    **config: Any,
) -> pathlib.Path:
    """A llama of one layer with this tokenizer; it ends texts with id 0, `<|eos|>`."""
    import jax

    from jaxtrain.models.config import ModelConfig
    from jaxtrain.models.hf_save import save_pretrained
    from jaxtrain.models.transformer import Decoder

    options = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    } | config
    sizes = ModelConfig.from_hf(options)
    params = jax.jit(Decoder(sizes).init)(jax.random.key(seed))
    save_pretrained(path, sizes, params)
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer.save_pretrained(str(path))
    return path


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())
