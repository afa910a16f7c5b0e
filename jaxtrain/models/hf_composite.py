"""Text decoders that are published inside a wrapper, beside towers for images.

The wrapper's config.json has the decoder's under `text_config`. Its tensors carry a
prefix: "language_model.model." in files of transformers 4, "model.language_model." in
the modules of transformers 5; every tensor without one belongs to a tower. Only the
decoder is loaded and trained. `hf_save.save_in_wrapper` puts it back.
"""

import logging
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from jaxtrain.models.families import OTHER_NAMES, WRAPPERS
from jaxtrain.models.hf_files import find_weights, is_own_file, read_header, read_json
from jaxtrain.models.hf_names import EMBEDDING, HEAD, WEIGHTS_INDEX
from jaxtrain.storage.reading import AnyFile

logger = logging.getLogger(__name__)

# What the wrapper says for the decoder as well.
_SHARED_KEYS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config",
    "tie_word_embeddings",
)  # fmt: skip
# Wrappers whose embedding is not the head where they do not say so.
_UNTIED = frozenset({"qwen3_5", "qwen3_5_moe"})
_OLD, _NEW = "language_model.model.", "model.language_model."
_OLD_HEAD = f"language_model.{HEAD}"
_JOINED = "experts.gate_up_proj"
# What rope_parameters takes the place of.
_OLD_ROPE = ("rope_scaling", "rope_theta", "rope_local_base_freq")


def is_composite(options: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a wrapper."""
    named, text = options.get("model_type"), options.get("text_config")
    return isinstance(text, Mapping) and isinstance(named, str) and named in WRAPPERS


def is_wrapped(path: str | os.PathLike[str] | None) -> bool:
    """Whether a directory's model is inside a wrapper."""
    file = pathlib.Path(path) / "config.json" if path is not None else None
    return file is not None and file.is_file() and is_composite(read_json(file))


def text_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's part of a config.json; all of it where there is no wrapper."""
    if not is_composite(options):
        return _by_our_name(options)
    text = _by_our_name(options["text_config"])
    text.setdefault("model_type", WRAPPERS[options["model_type"]])
    # transformers ties by the wrapper's value; where it says nothing, most are tied.
    shared = {name: options[name] for name in _SHARED_KEYS if name in options}
    tied = options["model_type"] not in _UNTIED
    return {**text, "tie_word_embeddings": tied, **shared}


def _by_our_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a family that transformers has under another name."""
    named = options.get("model_type")
    if isinstance(named, str) and named in OTHER_NAMES:
        return {**options, "model_type": OTHER_NAMES[named]}
    return dict(options)


def text_name(name: str) -> str | None:
    """The name of a wrapper's tensor in the decoder; None for those of towers."""
    for prefix in (_OLD, _NEW):
        if name.startswith(prefix):
            # transformers 5.24 saves the layers of Kimi K2.5 as "blocks".
            rest = name.removeprefix(prefix)
            return f"model.{rest.replace('blocks.', 'layers.', 1)}"
    return HEAD if name in (HEAD, _OLD_HEAD) else None


def wrapped_config(source: pathlib.Path, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The wrapper's config.json with these options of the decoder changed."""
    options = read_json(source / "config.json")
    dropped = _OLD_ROPE if "rope_parameters" in changed else ()
    text = {k: v for k, v in options["text_config"].items() if k not in dropped}
    shared = {k: v for k, v in changed.items() if k in _SHARED_KEYS}
    return {**options, **shared, "text_config": {**text, **changed}}


def plan_files(
    source: pathlib.Path, names: Collection[str]
) -> list[tuple[AnyFile, dict[str, str | None]]]:
    """The files of a wrapper with what each is to hold, for new tensors of the decoder.

    Args:
        names: the decoder's tensors. Those that the wrapper lacks (a head that is no
            longer the embedding) go into the last file.

    Returns:
        For each file, the names of its tensors, and for each the decoder's tensor that
        takes its place; None where the wrapper's own stays.
    """
    files, _ = find_weights(source)
    plan: list[tuple[AnyFile, dict[str, str | None]]] = []
    for file in files:
        header, _ = read_header(file)
        stored = {name: text_name(name) for name in header}
        # A stored copy of an embedding that is the head stays a copy.
        if HEAD not in names:
            stored = {k: EMBEDDING if v == HEAD else v for k, v in stored.items()}
        plan.append((file, {k: v for k, v in stored.items() if v in {None, *names}}))
    is_old = any(name.startswith(_OLD) for _, stored in plan for name in stored)
    placed = {own for _, stored in plan for own in stored.values()}
    plan[-1][1].update(
        {_wrapped_name(own, is_old): own for own in names if own not in placed}
    )
    return plan


def has_joined_experts(source: pathlib.Path) -> bool:
    """Whether a wrapper has all experts of a layer in two tensors."""
    files, _ = find_weights(source)
    headers = (read_header(file)[0] for file in files)
    return any(name.endswith(_JOINED) for header in headers for name in header)


def copy_others(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy all files but weights that `target` has not: of processors, and notes.

    A link to a file that is not the model's is left out: an export may be published.
    """
    weights = (".safetensors", ".bin", ".pth", ".gguf")
    for file in source.iterdir():
        is_weights = file.suffix in weights or file.name == WEIGHTS_INDEX
        if is_weights or not file.is_file() or (target / file.name).exists():
            continue
        if not is_own_file(file):
            logger.warning(
                "%s is a link to %s, outside of the model's directory: it is not"
                " exported; copy it there by hand if it belongs to the model",
                file, file.resolve(),
            )  # fmt: skip
            continue
        shutil.copy(file, target / file.name)


def _wrapped_name(name: str, is_old: bool) -> str:
    if name == HEAD:
        return _OLD_HEAD if is_old else HEAD
    return (_OLD if is_old else _NEW) + name.removeprefix("model.")
