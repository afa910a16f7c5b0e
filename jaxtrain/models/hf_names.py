"""How leaves of the tree and tensors of a Hugging Face checkpoint correspond.

A tensor's name is the path of its leaf with "model." before and ".weight" behind, once
for each layer of its stack; matrices are [in, out] in the tree and [out, in] in the
file. Of a mixture of experts each expert's matrices are tensors of their own, but for
gpt-oss (hf_experts.py).
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxtrain.models import hf_experts
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.quantization import STAY_FLOAT32
from jaxtrain.models.stacks import LAYERS, layer_numbers, split_path
from jaxtrain.models.transformer import Decoder
from jaxtrain.tree import flatten

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# The float types of safetensors files.
NUMPY_TYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip

# Leaves whose tensors are called as they are; others are some module's "weight".
_OWN_NAMES = frozenset(
    {
        "bias", "sinks", "A_log", "dt_bias", "e_score_correction_bias",
        "per_expert_scale",
    }
)  # fmt: skip
Path = tuple[str, ...]
# Which part of a leaf a tensor is: (), (place in the stack,) or (place, expert).
Place = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree and the tensors that it is made of."""

    path: Path
    shape: tuple[int, ...]
    model_type: str

    @property
    def stacked(self) -> bool:
        return self.path[0] == LAYERS

    @property
    def is_expert(self) -> bool:
        """Whether it holds matrices of experts."""
        return "experts" in self.path

    @property
    def _is_stack(self) -> bool:
        """Whether all experts of a layer are one tensor, which is as in the tree."""
        names = hf_experts.NAMES.get(self.model_type)
        return self.is_expert and names is not None and names.stacked

    @property
    def stacked_axes(self) -> int:
        """How many axes count tensors: layers, then experts."""
        return self.stacked + (self.is_expert and not self._is_stack)

    @property
    def transposed(self) -> bool:
        if self._is_stack:
            return False
        return self.path[-1] in ("kernel", "weight", "router_weight") or self.is_expert

    @property
    def stays_float32(self) -> bool:
        """Whether it is float32 whatever the type of the other weights."""
        return self.path[-1] in STAY_FLOAT32

    @property
    def columns_axis(self) -> int | None:
        """The axis along a row of the tensors' matrices; None where they are none."""
        if len(self.shape) - self.stacked_axes != 2:
            return None
        return len(self.shape) - (2 if self.transposed else 1)

    @property
    def places(self) -> list[Place]:
        """One of each tensor."""
        return list(itertools.product(*map(range, self.shape[: self.stacked_axes])))

    def layer(self, place: Place) -> int | None:
        """The number of a tensor's layer; None outside of the layers."""
        root, _ = split_path(self.path)
        return layer_numbers(root, self.shape[0])[place[0]] if root else None

    def tensor_name(self, place: Place) -> str:
        _, modules = split_path(self.path[:-1])
        if self.stacked:
            modules = (LAYERS, str(self.layer(place)), *modules)
        names = hf_experts.NAMES.get(self.model_type, hf_experts.Names())
        if modules[-1] == "gate":
            modules = (*modules[:-2], names.module, names.router)
        if self.is_expert and not self._is_stack:
            expert = ("experts", str(place[1]), names.projections[self.path[-1]])
            modules = (*modules[:2], *filter(None, [names.module]), *expert)
        if modules[0] != "lm_head":
            modules = ("model", *modules)
        if self.path[-1] == "buffer":
            return ".".join(modules)
        if self.path[-1] == "router_scale":
            return ".".join((*modules, "scale"))
        own_name = self._is_stack or self.path[-1] in _OWN_NAMES
        return ".".join((*modules, self.path[-1] if own_name else "weight"))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[self.stacked_axes :]
        return shape[::-1] if self.transposed else shape


def leaves_of(config: ModelConfig) -> list[Leaf]:
    """Every leaf of a model without adapters."""
    abstract = flatten(Decoder(config).abstract_params())
    return [
        Leaf(path, leaf.shape, config.model_type) for path, leaf in abstract.items()
    ]
