"""How a mixture of experts is stored by Hugging Face: two forms, of which one is kept.

On the hub each expert has three tensors; `Leaf.tensor_name` names them, and that is
what is written, as transformers 5 does by default too. In memory, and in a file if
asked to, it stacks all experts of a layer, with gate and up in one tensor:
`split_fused` shows such a file as if it were of the first form. Gemma 4 is published in
stacks, and wrappers may be: `join_fused` makes them again.

gpt-oss has stacks only, of matrices [in, out] in which the columns of gate and up take
turns. There a layer's stack is one tensor, `split_fused` shows gate and up apart, and
`join_fused` puts them together again.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Names:
    """How a family calls the parts of its mixture.

    `module` holds router and experts; `projections` are those of an expert. `stacked`:
    all experts of a layer are one tensor, as in memory here. `joined`: they are two
    tensors, as in transformers' memory, and are written so.
    """

    module: str = "mlp"
    router: str = "gate"
    projections: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stacked: bool = False
    joined: bool = False


_PLAIN = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_APART = (
    "deepseek_v2", "deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_moe", "qwen3_next",
)  # fmt: skip
NAMES: Mapping[str, Names] = {
    "mixtral": Names(
        "block_sparse_moe",
        projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    **dict.fromkeys(_APART, Names(projections=_PLAIN)),
    "gemma4_text": Names("", projections=_PLAIN, joined=True),
    "gpt_oss": Names(router="router", stacked=True),
}
_FUSED = re.compile(r"(model\.layers\.\d+\.)(?:mlp\.)?(experts\.|)(\w+)(\.weight|)")
# Tensors whose columns take turns, and the two that they are.
_TURNS = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)gate_up_proj(_bias|)")
# Tensors of one expert.
_EXPERT = re.compile(r"(model\.layers\.\d+\.(?:\w+\.)?experts\.)(\d+)\.(\w+)\.weight")
_HALVES = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate|up)_proj(_bias|)")


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


@dataclasses.dataclass(frozen=True)
class _EveryOther:
    """The even columns of a tensor (`first` 0), or the odd ones (1).

    Behaves as a slice of a safetensors file, which knows no steps.
    """

    whole: Any
    first: int

    def get_dtype(self) -> str:
        """As the file names it."""
        return self.whole.get_dtype()

    def get_shape(self) -> list[int]:
        """Of this half."""
        *outer, columns = self.whole.get_shape()
        return [*outer, columns // 2]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        *outer, columns = index
        start, stop, _ = columns.indices(self.get_shape()[-1])
        both = self.whole[(*outer, slice(2 * start, 2 * stop))]
        return both[..., self.first :: 2]


def split_fused(model_type: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint by the hub's names, stacks shown expert by expert.

    Changes nothing of families without experts, and nothing that is in that form.
    """
    if model_type not in NAMES:
        return dict(tensors)
    names = NAMES[model_type]
    if names.stacked:
        return _split_turns(tensors)
    split = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        layer, inner, leaf, _ = match.groups() if match else ("", "", "", "")
        shape = tensor.get_shape()
        if inner and leaf in ("gate_up_proj", "down_proj") and len(shape) == 3:
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            rows = shape[1] // len(parts)
            of_experts = f"{layer}{names.module}.experts".replace("..", ".")
            for expert in range(shape[0]):
                for number, part in enumerate(parts):
                    own = f"{of_experts}.{expert}.{names.projections[part]}.weight"
                    split[own] = _Part(tensor, expert, number * rows, rows)
        elif match and not inner and leaf == "gate":
            split[f"{layer}{names.module}.gate.weight"] = tensor
        else:
            split[name] = tensor
    return split


def are_joined(model_type: str) -> bool:
    """Whether a family's experts are written as two tensors a layer."""
    return model_type in NAMES and NAMES[model_type].joined


def _split_turns(tensors: Mapping[str, Any]) -> dict[str, Any]:
    split = {}
    for name, tensor in tensors.items():
        match = _TURNS.fullmatch(name)
        if match is None:
            split[name] = tensor
            continue
        for first, half in enumerate(("gate", "up")):
            own = f"{match[1]}{half}_proj{match[2]}"
            if hasattr(tensor, "every_other"):
                split[own] = tensor.every_other(first)
            else:
                split[own] = _EveryOther(tensor, first)
    return split


def stored_name(name: str, *, joined: bool) -> str:
    """The tensor of a file that a tensor, as `split_fused` names it, is a part of.

    Args:
        joined: whether the file has the experts of a layer in two tensors.
    """
    if match := _HALVES.fullmatch(name):
        return f"{match[1]}gate_up_proj{match[3]}"
    if joined and (match := _EXPERT.fullmatch(name)):
        return match[1] + ("down_proj" if match[3] == "down_proj" else "gate_up_proj")
    return name


def join_fused(
    tensors: Mapping[str, np.ndarray], *, joined: bool
) -> dict[str, np.ndarray]:
    """The tensors of a file, of those that `split_fused` made of it or would make.

    All parts of a tensor must be there. `joined` is as for `stored_name`.
    """
    whole: dict[str, np.ndarray] = {}
    parts: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for name, tensor in tensors.items():
        match, own = _HALVES.fullmatch(name), stored_name(name, joined=joined)
        if match is not None:
            if own not in whole:
                shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
                whole[own] = np.empty(shape, tensor.dtype)
            whole[own][..., int(match[2] == "up") :: 2] = tensor
        elif own == name:
            whole[name] = tensor
        elif match := _EXPERT.fullmatch(name):
            parts.setdefault(own, {})[int(match[2]), match[3]] = tensor
    for own, by_expert in parts.items():
        # Of an expert the gate is above: "gate_proj" comes before "up_proj".
        count = len({expert for expert, _ in by_expert})
        in_order = [by_expert[place] for place in sorted(by_expert)]
        columns = in_order[0].shape[-1]
        whole[own] = np.concatenate(in_order).reshape(count, -1, columns)
    return whole
