"""How a mixture of experts is stored by Hugging Face: two forms, of which one is kept.

On the hub each expert has three tensors; `Leaf.tensor_name` names them, and that is
what is written, as transformers 5 does by default too. In memory, and in a file if
asked to, it stacks all experts of a layer, with gate and up in one tensor:
`split_fused` shows such a file as if it were of the first form.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# The module that holds router and experts, and the experts' projections in it.
NAMES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "mixtral": (
        "block_sparse_moe",
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    "qwen3_moe": ("mlp", {n: n for n in ("gate_proj", "up_proj", "down_proj")}),
}
_FUSED = re.compile(r"(model\.layers\.\d+\.)mlp\.(experts\.|)(\w+)(\.weight|)")


@dataclasses.dataclass(frozen=True)
class _Part:
    """One matrix of a stack [E O I]: of this expert, its rows from `first` on.

    Behaves as a slice of a safetensors file.
    """

    stack: Any
    expert: int
    first: int
    rows: int

    def get_dtype(self) -> str:
        """As the file names it."""
        return self.stack.get_dtype()

    def get_shape(self) -> list[int]:
        """Of this part."""
        return [self.rows, self.stack.get_shape()[2]]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        start, stop, _ = rows.indices(self.rows)
        own = slice(self.first + start, self.first + stop)
        return self.stack[self.expert : self.expert + 1, own, columns][0]


def split_fused(model_type: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint by the hub's names, stacks shown expert by expert.

    Changes nothing of families without experts, and nothing that is in that form.
    """
    if model_type not in NAMES:
        return dict(tensors)
    module, projections = NAMES[model_type]
    split = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        layer, inner, leaf, _ = match.groups() if match else ("", "", "", "")
        shape = tensor.get_shape()
        if inner and leaf in ("gate_up_proj", "down_proj") and len(shape) == 3:
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            rows = shape[1] // len(parts)
            for expert in range(shape[0]):
                for number, part in enumerate(parts):
                    own = f"{layer}{module}.experts.{expert}.{projections[part]}.weight"
                    split[own] = _Part(tensor, expert, number * rows, rows)
        elif match and not inner and leaf == "gate":
            split[f"{layer}{module}.gate.weight"] = tensor
        else:
            split[name] = tensor
    return split
