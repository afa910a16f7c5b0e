"""A checkpoint of random weights from its config.json, written layer by layer.

    python benchmarks/random_model.py configs/shapes/llama-3.1-8b OUT [--layers=N]

For models that are too large to be made at once: 8B in bfloat16 are 16 GB of files,
Qwen3-30B-A3B 61 GB. Dense models of llama, qwen2 and qwen3, and qwen3_moe, under the
names of their published checkpoints.
"""

import argparse
import concurrent.futures
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
_DEVIATION = 0.02


def make_config(source: pathlib.Path | Mapping[str, Any], layers: int | None) -> dict:
    """A config.json as a dict, with `layers` layers if that is given."""
    config: dict[str, Any] = (
        dict(source)
        if isinstance(source, Mapping)
        else json.loads((source / "config.json").read_text())
    )
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config


def shards(config: Mapping[str, Any]) -> Iterator[Shapes]:
    """The shapes of all weights by name: those of each layer, then the ends.

    Raises:
        ValueError: a family that this does not know.
    """
    kind = config["model_type"]
    if kind not in ("llama", "qwen2", "qwen3", "qwen3_moe"):
        raise ValueError(f"model_type = {kind!r}: only llama, qwen2, qwen3, qwen3_moe")
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    for number in range(config["num_hidden_layers"]):
        layer = {**_attention(config), **_feed_forward(config)}
        layer["input_layernorm.weight"] = (width,)
        layer["post_attention_layernorm.weight"] = (width,)
        yield {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    ends: Shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not config.get("tie_word_embeddings", False):
        ends["lm_head.weight"] = (vocabulary, width)
    yield ends


def _attention(config: Mapping[str, Any]) -> Shapes:
    kind, width = config["model_type"], config["hidden_size"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or width // heads
    found: Shapes = {"self_attn.o_proj.weight": (width, heads * head)}
    for name, count in (("q", heads), ("k", shared), ("v", shared)):
        found[f"self_attn.{name}_proj.weight"] = (count * head, width)
        if kind == "qwen2":
            found[f"self_attn.{name}_proj.bias"] = (count * head,)
    if kind.startswith("qwen3"):
        found |= {f"self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    return found


def _feed_forward(config: Mapping[str, Any]) -> Shapes:
    width, experts = config["hidden_size"], config.get("num_experts")
    inner = config["moe_intermediate_size" if experts else "intermediate_size"]

    def mlp(prefix: str) -> Shapes:
        return {
            f"{prefix}.gate_proj.weight": (inner, width),
            f"{prefix}.up_proj.weight": (inner, width),
            f"{prefix}.down_proj.weight": (width, inner),
        }

    if not experts:
        return mlp("mlp")
    found: Shapes = {"mlp.gate.weight": (experts, width)}
    for expert in range(experts):
        found |= mlp(f"mlp.experts.{expert}")
    return found


def write(config: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write the model in bfloat16: norms 1, biases 0, all else normal."""
    import safetensors.torch
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16

    def make(name: str, shape: tuple[int, ...]) -> Any:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=dtype)
        drawn = torch.empty(shape, dtype=dtype, device=device)
        return drawn.normal_(0, _DEVIATION).cpu()

    index: dict[str, str] = {}
    torch.manual_seed(0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        writing: list[concurrent.futures.Future] = []
        for number, shapes in enumerate(shards(config)):
            file = f"model-{number:05}.safetensors"
            tensors = {name: make(name, shape) for name, shape in shapes.items()}
            index |= dict.fromkeys(shapes, file)
            save = safetensors.torch.save_file
            writing.append(
                pool.submit(save, tensors, folder / file, metadata={"format": "pt"})
            )
            if number >= 4:  # as many layers as wait for the disk are in memory
                writing[number - 4].result()
        for future in writing:
            future.result()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(dict(config)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path, help="folder with a config.json")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    write(make_config(options.source, options.layers), options.out)


if __name__ == "__main__":
    main()
