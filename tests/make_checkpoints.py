"""Write `tests/checkpoints`: half-done runs by the code as it is, to resume for ever.

    PYTHONPATH=. python tests/make_checkpoints.py

This was run once, before the code was refactored (at commit df4a9b4), and should be run
again only if the format of checkpoints is to break: `old_checkpoints_test.py` holds the
code of today to the files of then. The folder gets

    tiny_model/            a Hugging Face folder with a tokenizer, 40 tokens, width 4
    <training type>/       a work directory with the checkpoint of step 6 of 9
    digests.json           of each type the restored leaves: dtype, shape and SHA-256

Everything is drawn by fixed seeds. Orbax notes the temporary folder in which a
checkpoint was written (commit_success.txt) and never reads it.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any
from unittest import mock

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from checkpoint_runs import (
    FOLDER,
    MODEL,
    SAVED_STEP,
    STEPS,
    TYPES,
    make_config,
    train,
)
from tokenizers import decoders, models, pre_tokenizers

_PAD, _EOS = "<|pad|>", "<|eos|>"
_MERGES = ("t h", "th e", "Ġ the", "e e", "o u", "r e", "i n")
_MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def restored_state(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """What the product restores in `workdir` as it starts to train on.

    This function alone knows the inside of the package: it stops the loop when the
    checkpoint is restored and nothing is trained yet.

    Returns:
        `state`, the tree of arrays; `next_batch`, the arrays of the first batch to
        come; `record`, the other values in JSON's types.
    """
    from jaxtrain.loop import Loop
    from jaxtrain.record import summary

    found: dict[str, Any] = {}

    def take(loop: Loop) -> dict[str, Any]:
        found["state"] = loop.state
        found["record"] = {
            "step": loop.step,
            "num_tokens": loop.progress.num_tokens,
            "best_metric": loop.progress.best.value,
            "best_step": loop.progress.best.step,
            "data_position": loop.parts.train_batches.get_state(loop.step),
        }
        found["next_batch"] = next(loop.parts.train_batches)
        loop.parts.train_batches.close()
        return {}

    config.training.save_final_model = False
    with (
        mock.patch.object(Loop, "run_to_end", take),
        mock.patch.object(summary, "log_summary"),  # there are no results
    ):
        train(config, workdir)
    return found


def digests(tree: Any) -> dict[str, list[Any]]:
    """Dtype, shape and SHA-256 of each leaf, by its dotted path."""

    def digest(leaf: Any) -> list[Any]:
        dtype = str(leaf.dtype)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return [dtype, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]

    return {
        jax.tree_util.keystr(path, simple=True, separator="."): digest(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """What `restored_state` found as digests.json holds it."""
    return {
        "record": found["record"],
        "state": digests(found["state"]),
        "next_batch": digests(found["next_batch"]),
    }


def to_text(value: Any, indent: str = "") -> str:
    """JSON with one line for each leaf, so that a difference can be read."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = f"{indent} "
    lines = [f'{inner}"{name}": {to_text(v, inner)}' for name, v in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" + ("" if indent else "\n")


def write_tokenizer(directory: pathlib.Path) -> None:
    """A byte-level BPE tokenizer of 40 tokens at most, enough for our sentences."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "."]
    merges = [tuple(pair.split()) for pair in _MERGES]
    tokens = [_PAD, _EOS, *letters, *("".join(pair) for pair in merges)]
    assert len(tokens) <= _MODEL_CONFIG["vocab_size"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_PAD, _EOS])
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n")
    settings = {
        "eos_token": _EOS,
        "pad_token": _PAD,
        "model_max_length": 64,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def write_model(directory: pathlib.Path) -> None:
    """A Llama whose norms are random too, so that no two leaves agree."""
    width, inner, key_value = 4, 8, 2
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (40, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (40, width),
    }
    for layer in range(2):
        for name, shape in {
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (key_value, width),
            "self_attn.v_proj.weight": (key_value, width),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.normal(0, 0.1, shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    safetensors.numpy.save_file(
        tensors, directory / "model.safetensors", metadata={"format": "pt"}
    )
    (directory / "config.json").write_text(json.dumps(_MODEL_CONFIG, indent=1) + "\n")


def keep_saved_step(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy of a finished run what is left of it if it was stopped at `SAVED_STEP`."""
    saved = pathlib.Path("checkpoints") / str(SAVED_STEP)
    shutil.copytree(source / saved, target / saved)


def main() -> None:
    """Write the whole folder anew."""
    logging.basicConfig(level=logging.WARNING)
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    MODEL.mkdir(parents=True)
    write_tokenizer(MODEL)
    write_model(MODEL)
    os.chdir(FOLDER)  # the stored configs name the model by a relative path
    made = {}
    for training_type in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            config = make_config(training_type, MODEL.name)
            config.training.save_final_model = False
            results = train(config, pathlib.Path(folder) / "run")
            assert results["global_step"] == STEPS
            keep_saved_step(pathlib.Path(folder) / "run", FOLDER / training_type)
            copy = pathlib.Path(folder) / "copy"
            shutil.copytree(FOLDER / training_type, copy)
            made[training_type] = describe(restored_state(config, copy))
    (FOLDER / "digests.json").write_text(to_text(made))
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes")


if __name__ == "__main__":
    main()
