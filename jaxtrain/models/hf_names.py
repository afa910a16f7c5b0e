"""How leaves of the tree and tensors of a Hugging Face checkpoint correspond.

A tensor's name is the path of its leaf with "model." before and ".weight" behind, once
for each layer; kernels are [in, out] in the tree and [out, in] in the file.
"""

import dataclasses
from collections.abc import Sequence

from jaxtrain.models.binding import flatten
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Decoder

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree and the tensors that it is made of."""

    path: Path
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def layers(self) -> Sequence[int | None]:
        return range(self.shape[0]) if self.stacked else (None,)

    def tensor_name(self, layer: int | None) -> str:
        modules = self.path[:-1]
        if layer is not None:
            modules = ("layers", str(layer), *modules[1:])
        if modules[0] != "lm_head":
            modules = ("model", *modules)
        return ".".join((*modules, "bias" if self.path[-1] == "bias" else "weight"))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves_of(config: ModelConfig) -> list[Leaf]:
    """Every leaf of a model without adapters."""
    abstract = flatten(Decoder(config).abstract_params())
    return [Leaf(path, leaf.shape) for path, leaf in abstract.items()]
