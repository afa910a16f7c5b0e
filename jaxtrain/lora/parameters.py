"""Adapters of a mixture's router and experts: PEFT's `target_parameters`.

transformers has no linear layers there but parameters, of all experts together:
`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`, and the router's `mlp.gate.weight`
(gpt-oss: `mlp.router.weight`). An entry of `target_parameters` is the end of such a
name.

PEFT stores a parameter's A [E in r] as one matrix [E r, in], expert by expert, and its
B [E r out] as [out, r E], in which a rank's experts are neighbours. Where both
parameters of experts have an adapter, that of gate and up is called `base_layer`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxtrain.models.expert_adapters import ADAPTERS, PARAMETERS, split_columns
from jaxtrain.models.quantization import PROJECTIONS, kept_as, kernel_shape
from jaxtrain.models.stacks import layer_numbers, split_path
from jaxtrain.record.safe_text import shown

if TYPE_CHECKING:
    from jaxtrain.lora.targets import LoraConfig

TreePath = tuple[str, ...]
# What a router's weight may be called; the second is kept in float32.
_ROUTER_WEIGHTS = {"weight", "router_weight"}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a mixture that an adapter may stand beside, in all its layers."""

    path: TreePath  # where the adapter stands
    names: tuple[str, ...]  # PEFT's, one a layer
    shape: tuple[int, ...]  # [L E in out], of a router [L in out]
    in_turns: bool = False  # whether gate's and up's columns alternate

    @property
    def is_router(self) -> bool:
        return ADAPTERS not in self.path

    @property
    def label(self) -> str:
        """Where it stands in a layer, behind its stack's name where layers differ."""
        return ".".join(self.path[1:])

    @property
    def name(self) -> str:
        """Its name within a layer, which `target_parameters` may hold."""
        return _inner(self.names[0])


def iterate_parameters(
    tree: Mapping[str, Any], path: TreePath = ()
) -> Iterator[Parameter]:
    """Every parameter that may have an adapter, of a tree with or without arrays."""
    for key, below in tree.items():
        if not isinstance(below, Mapping):
            continue
        if key == "experts" and path and "gate" in tree:
            yield from _of_mixture(tree, path)
        else:
            yield from iterate_parameters(below, (*path, key))


def _of_mixture(mixture: Mapping[str, Any], path: TreePath) -> Iterator[Parameter]:
    """A router's weight, and the two parameters of its experts."""
    experts, gate = mixture["experts"], mixture["gate"]
    biased = "gate_proj_bias" in experts
    inwards, _, outwards = (_shape_of(experts, name) for name in PROJECTIONS)
    fused = (*inwards[:-1], 2 * inwards[-1])
    place, layers = (*path, "gate"), inwards[0]
    for leaf in _ROUTER_WEIGHTS & gate.keys():
        names = _names_of(place, layers, "router" if biased else "gate")
        yield Parameter(place, names, tuple(gate[leaf].shape))
    for name, shape in zip(PARAMETERS, (fused, outwards), strict=True):
        place = (*path, "experts", ADAPTERS, name)
        names = _names_of(place, layers)
        yield Parameter(place, names, shape, biased and name == "gate_up_proj")


def _names_of(place: TreePath, layers: int, router: str = "gate") -> tuple[str, ...]:
    """PEFT's names of the parameter whose adapter stands at a place, one a layer."""
    root, below = split_path(place)
    inner = tuple(part for part in below if part != ADAPTERS)
    if below[-1] == "gate":
        inner = (*below[:-1], router, "weight")
    numbers = layer_numbers(root, layers)
    return tuple(".".join(("model.layers", str(i), *inner)) for i in numbers)


def _shape_of(leaves: Mapping[str, Any], name: str) -> tuple[int, ...]:
    codes, _ = kept_as(name)
    return kernel_shape(leaves[codes]) if codes in leaves else tuple(leaves[name].shape)


def find(tree: Mapping[str, Any]) -> dict[TreePath, Parameter]:
    """The same by where their adapters stand."""
    return {parameter.path: parameter for parameter in iterate_parameters(tree)}


def select(lora: "LoraConfig", tree: Mapping[str, Any]) -> list[Parameter]:
    """The parameters that `target_parameters` names.

    Raises:
        ValueError: an entry matches none, or only some layers of a stack; or other
            settings ask for what adapters of parameters cannot do.
    """
    known = list(iterate_parameters(tree))
    found: dict[TreePath, Parameter] = {}
    for entry in lora.target_parameters or ():
        hits = {p.path: [_ends(name, entry) for name in p.names] for p in known}
        chosen = [p for p in known if any(hits[p.path])]
        if not chosen or entry == "weight":
            raise ValueError(
                f"lora.target_parameters: {shown(entry)} names no parameter of a router"
                f" or of experts{_choices(known)}. Linear layers go by target_modules"
            )
        for parameter in chosen:
            if not all(hits[parameter.path]):
                raise ValueError(
                    f"lora.target_parameters: {shown(entry)} selects {parameter.name}"
                    " in some layers only, but layers are stacked and train alike:"
                    " leave the layer's number out"
                )
            found[parameter.path] = parameter
    if found:
        _refuse_variants(lora, known)
    return list(found.values())


def _choices(known: Iterable[Parameter]) -> str:
    names = sorted({parameter.name for parameter in known})
    return f": choose from {names}" if names else "; this model has none"


def _refuse_variants(lora: "LoraConfig", known: Iterable[Parameter]) -> None:
    """What PEFT refuses for parameters too, and biases that it would not save."""
    fixes = {
        "lora_dropout": (lora.dropout > 0, lora.dropout, "0"),
        "use_dora": (lora.use_dora, True, "false"),
        "init_lora_weights": (
            lora.changes_base,
            lora.init_lora_weights,
            "default or gaussian",
        ),
        "bias": (
            lora.bias == "lora_only" and any(p.in_turns for p in known),
            lora.bias,
            "none",
        ),
    }
    for key, (is_wrong, value, fix) in fixes.items():
        if is_wrong:
            raise ValueError(
                f"lora.{key} = {shown(value)}: adapters of a router or of experts have"
                f" none of this, in PEFT too: set it to {fix}, or keep adapters to"
                " linear layers (lora.target_parameters = [])"
            )


def hint(tree: Mapping[str, Any]) -> str:
    """What a message adds about names of a mixture that are no linear layers."""
    known = list(iterate_parameters(tree))
    if not known:
        return ""
    return f". A router and experts go by target_parameters{_choices(known)}"


def has_biases(tree: Mapping[str, Any]) -> bool:
    """Whether routers and experts have biases, as gpt-oss's."""
    return any(parameter.in_turns for parameter in iterate_parameters(tree))


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


# --- files ------------------------------------------------------------------------


def of_adapters(
    flat: Mapping[TreePath, Any], entries: Iterable[str] | None
) -> dict[TreePath, tuple[str, ...]]:
    """The names of the parameters that adapters are of, by where these stand.

    Args:
        flat: what trains, by path; adapters of linear layers are passed over.
        entries: the `target_parameters` that chose them; they say what a router is
            called, which its adapter does not.
    """
    ends = {tuple(entry.split(".")[-2:]) for entry in entries or ()}
    router = "router" if ("router", "weight") in ends else "gate"
    return {
        path[:-1]: _names_of(path[:-1], leaf.shape[0], router)
        for path, leaf in flat.items()
        if path[-1] == "lora_a" and (path[-2] == "gate" or ADAPTERS in path)
    }


def entries_of(mixture: Mapping[TreePath, tuple[str, ...]]) -> list[str]:
    """What `target_parameters` names these parameters: in full where layers differ."""
    return sorted(
        name.removeprefix("model.") if len(split_path(path)[0]) > 1 else _inner(name)
        for path, names in mixture.items()
        for name in names[: None if len(split_path(path)[0]) > 1 else 1]
    )


def _inner(name: str) -> str:
    return re.sub(r"^model\.layers\.\d+\.", "", name)


def names_in_file(entries: Iterable[str], stems: Iterable[str]) -> dict[str, list[str]]:
    """Of each entry of `target_parameters` the routers' and experts' names in a file.

    Linear layers, which PEFT takes by the names of their weights too, are none.

    Args:
        stems: what the file's adapters belong to.
    """
    found: dict[str, list[str]] = {entry: [] for entry in entries}
    for stem in map(_owner, stems):
        for entry, names in found.items():
            leaf = entry.rpartition(".")[2]
            owners = ("gate", "router") if leaf == "weight" else ("experts",)
            name = f"{stem}.{leaf}"
            if stem.rpartition(".")[2] in owners and _ends(name, entry):
                names.append(name)
    return {entry: names for entry, names in found.items() if names}


def wraps(stem: str, names: Iterable[str]) -> bool:
    """Whether an adapter in a file is that of one of these parameters."""
    return any(name.rpartition(".")[0] == _owner(stem) for name in names)


def _owner(stem: str) -> str:
    return stem.removesuffix(".base_layer")


def stems_of(parameters: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, int]]:
    """What PEFT's files call each parameter: its name, and its place in its stack."""
    every = {name: at for names in parameters for at, name in enumerate(names)}
    stems = {}
    for name, at in every.items():
        owner, _, leaf = name.rpartition(".")
        nested = leaf == "gate_up_proj" and f"{owner}.down_proj" in every
        stems[f"{owner}.base_layer" if nested else owner] = (name, at)
    return stems


def to_file(leaf: str, values: Float[np.ndarray, "E I O"]) -> Float[np.ndarray, "A B"]:
    """One layer's A [E in r] or B [E r out] as PEFT stores it; a router's has no E."""
    if values.ndim == 2:
        return values.T
    if leaf == "lora_a":
        return values.transpose(0, 2, 1).reshape(-1, values.shape[1])
    return values.transpose(2, 1, 0).reshape(values.shape[2], -1)


def from_file(
    leaf: str, stored: Float[np.ndarray, "A B"], parameter: Parameter
) -> Float[np.ndarray, "E I O"]:
    """The inverse of `to_file`; what cannot be one is returned transposed."""
    experts = parameter.shape[-3]
    if parameter.is_router or stored.ndim != 2 or stored.size % experts:
        return stored.T
    rows, columns = stored.shape
    if leaf == "lora_a" and rows % experts == 0:
        return stored.reshape(experts, -1, columns).transpose(0, 2, 1)
    if leaf == "lora_b" and columns % experts == 0:
        return stored.reshape(rows, -1, experts).transpose(2, 1, 0)
    return stored.T


def share_of(
    path: TreePath,
    adapters: Mapping[TreePath, Any],
    parameter_at: Mapping[TreePath, Parameter],
) -> tuple[Any, Any, tuple[str, ...]]:
    """A and B by which an adapter changes a leaf, and the names of its parameter.

    Args:
        path: the base's leaf. Of a router's weight and of experts' three matrices, with
            an adapter, there is such a change; of any other leaf A is None.
        adapters: leaves by path.
    """
    *owner, name = path
    place = tuple(owner)
    if owner[-1:] == ["experts"] and name in PROJECTIONS:
        place = (
            *owner,
            ADAPTERS,
            "down_proj" if name == "down_proj" else "gate_up_proj",
        )
    parameter, a = parameter_at.get(place), adapters.get((*place, "lora_a"))
    if parameter is None or a is None or name not in {*_ROUTER_WEIGHTS, *PROJECTIONS}:
        return None, None, ()
    b = adapters[*place, "lora_b"]
    if name in ("gate_proj", "up_proj"):
        b = split_columns(b, in_turns=parameter.in_turns)[name == "up_proj"]
    return a, b, parameter.names
