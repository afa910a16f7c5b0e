"""LoRA's settings, and which modules of a parameter tree they select, as PEFT would.

Modules go by Hugging Face's full names, one a layer (model.layers.0.self_attn.q_proj),
although the tree holds each module once for all layers of its stack.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxtrain.lora import parameters
from jaxtrain.lora.patterns import LayersDifferError, ends_one, why_none
from jaxtrain.models.layers import LoraShape
from jaxtrain.models.quantization import CODES, kernel_shape
from jaxtrain.models.stacks import LAYERS, layer_numbers, split_path
from jaxtrain.record.safe_text import shown
from jaxtrain.tree import get as tree_get

ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_magnitude")
# Initial values of adapters: PEFT's default and its variants of these names. The last
# two take the start of training out of the base.
INITS = ("default", "gaussian", "pissa", "olora")
BIASES = ("none", "all", "lora_only")

TreePath = tuple[str, ...]
EMBEDDING: TreePath = ("embed_tokens",)
HEAD: TreePath = ("lm_head",)
PROJECTION: TreePath = ("per_layer_model_projection",)  # Gemma 4's
# Settings that hold regular expressions.
_PATTERNS = ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """PEFT's LoraConfig, the part of it that is supported.

    The fields are keys of `training.lora` (docs/configuration.md); `alpha`, `dropout`
    are its lora_alpha and lora_dropout. A list holds endings of module names, in
    `modules_to_save` and `target_parameters` (parameters.py) too; one regular
    expression must match a whole name ("model.layers.0.self_attn.q_proj"), and may
    pass over `exclude_modules`. The first match of a pattern of ranks or alphas counts.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"
    target_parameters: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    init_lora_weights: str = "default"
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r = {self.r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.lora_dropout = {self.dropout} must be in [0, 1)")
        for key, known in (("bias", BIASES), ("init_lora_weights", INITS)):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"lora.{key} = {shown(getattr(self, key))} is unknown: choose from"
                    f" {', '.join(known)}"
                )
        if not (self.target_modules or self.target_parameters):
            raise ValueError(
                "lora.target_modules is empty: name modules, or say all-linear"
            )
        alphas = {
            f"alpha_pattern[{shown(k)}]": v for k, v in self.alpha_pattern.items()
        }
        for key, alpha in {"lora_alpha": self.alpha, **alphas}.items():
            is_number = type(alpha) in (int, float) and math.isfinite(alpha)
            if not is_number or alpha <= 0:
                raise ValueError(
                    f"lora.{key} = {shown(alpha)} must be a finite number above 0"
                )
        for key, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(
                    f"lora.rank_pattern = {{{shown(key)}: {shown(rank)}}}: a rank is a"
                    " whole number, at least 1"
                )
        for key in _PATTERNS:
            patterns = getattr(self, key)
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                whole = key == "target_modules"  # PEFT takes it as it is
                if reason := why_none(pattern, whole=whole):
                    raise ValueError(
                        f"lora.{key} = {shown(pattern)} is not a regular expression"
                        f" ({reason}): escape what is meant literally"
                    )

    @property
    def changes_base(self) -> bool:
        """Whether the frozen base is the model less its first adapters."""
        return self.init_lora_weights in ("pissa", "olora")

    def scaling(self, rank: int, alpha: float) -> float:
        """What A B is multiplied by."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_and_scaling(self, names: tuple[str, ...]) -> tuple[int, float]:
        """The rank of a module of these full names, and what multiplies its A B.

        Raises:
            ValueError: a pattern tells layers apart, which are stacked here.
        """
        chosen: list[Any] = []
        for key, default in (("rank_pattern", self.r), ("alpha_pattern", self.alpha)):
            patterns = getattr(self, key)
            values = [
                next((v for p, v in patterns.items() if ends_one(p, [name])), default)
                for name in names
            ]
            if len(set(values)) > 1:
                raise LayersDifferError(
                    f"lora.{key} = {shown(dict(patterns))} gives {names[0]} and its"
                    f" like in other layers {values}",
                    "write patterns without layer numbers",
                )
            chosen.append(values[0])
        return chosen[0], self.scaling(*chosen)


# --- modules and their names -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Module:
    """A node of the tree that holds arrays, or a group of such nodes in a layer."""

    path: TreePath  # ("layers", "self_attn", "q_proj")
    names: tuple[str, ...]  # Hugging Face's, one a layer
    leaves: Mapping[str, Any]  # empty for a group

    @property
    def is_inner_linear(self) -> bool:
        """Whether "all-linear" means it: PEFT leaves the head out."""
        return self.path != HEAD and bool({"kernel", CODES} & self.leaves.keys())

    @property
    def takes_adapter(self) -> bool:
        return self.is_inner_linear or self.path in (EMBEDDING, HEAD)

    @property
    def label(self) -> str:
        """Its name in a layer, behind its stack's where layers differ; or lm_head."""
        return ".".join(self.path[1:] if self.path[0] == LAYERS else self.path)

    @property
    def name(self) -> str:
        """Its name within a layer, or in the model, whatever the stack."""
        return ".".join(split_path(self.path)[1])


def iterate_modules(tree: Mapping[str, Any], path: TreePath = ()) -> Iterator[Module]:
    """Every node below the root, groups before what is in them, and a tied head."""
    for key in sorted(tree):
        child, child_path = tree[key], (*path, key)
        if not isinstance(child, Mapping):
            continue
        leaves = {k: v for k, v in child.items() if not isinstance(v, Mapping)}
        if split_path(child_path)[1]:
            layers = jax.tree.leaves(child)[0].shape[0]
            yield Module(child_path, full_names(child_path, layers), leaves)
        yield from iterate_modules(child, child_path)
    if not path and "embed_tokens" in tree and "lm_head" not in tree:
        yield Module(HEAD, ("lm_head",), {"tied": tree["embed_tokens"]["embedding"]})


def is_tied(tree: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: then only adapters stand at `lm_head`."""
    return "kernel" not in tree.get("lm_head", {})


def ties_adapters(lora: LoraConfig, tree: Mapping[str, Any]) -> bool:
    """Whether one adapter acts in the embedding and in the head."""
    may_tie = lora.ensure_weight_tying and is_tied(tree)
    return may_tie and "embed_tokens" in resolve_targets(lora, tree)


def label_path(label: str) -> TreePath:
    """Where a module stands; the inverse of `Module.label`."""
    path = tuple(label.split("."))
    return path if path in (EMBEDDING, HEAD, PROJECTION) else (LAYERS, *path)


def matrix_shape(tree: Mapping[str, Any], path: TreePath) -> tuple[int, ...]:
    """The shape [L in out] of what an adapter adds to; outside the layers [in out]."""
    if path == HEAD and is_tied(tree):
        return matrix_shape(tree, EMBEDDING)[::-1]
    if (parameter := parameters.find(tree).get(path)) is not None:
        return parameter.shape
    leaves = tree_get(tree, path)
    if CODES in leaves:
        return kernel_shape(leaves[CODES])
    return tuple(leaves["kernel" if "kernel" in leaves else "embedding"].shape)


def full_names(path: TreePath, layers: int) -> tuple[str, ...]:
    """Hugging Face's names of a module, one for each of its `layers` layers."""
    root, below = split_path(path)
    if root:
        inner = ".".join(below)
        numbers = layer_numbers(root, layers)
        return tuple(f"model.layers.{i}.{inner}" for i in numbers)
    name = ".".join(path)
    return (name if name == "lm_head" else f"model.{name}",)


def is_within(path: TreePath, parents: set[TreePath]) -> bool:
    """Whether `path` is one of `parents` or below one."""
    return any(path[: len(parent)] == parent for parent in parents)


def _in_every_layer(key: str, module: Module, matches: Callable[[str], bool]) -> bool:
    """Whether all of the module's names match; some but not all is refused."""
    matched = [matches(name) for name in module.names]
    if any(matched) and not all(matched):
        numbers = layer_numbers(split_path(module.path)[0], len(matched))
        layers = [i for i, hit in zip(numbers, matched, strict=True) if hit]
        raise LayersDifferError(
            f"{key} selects {module.label} in layers {layers} of {len(matched)} only",
            "write a pattern that matches it in every layer, such as"
            r" .*\.layers\.\d+\..*",
        )
    return all(matched)


def _is_target(lora: LoraConfig, entry: str, module: Module) -> bool:
    """Whether an entry of target_modules names this module, by PEFT's rule.

    An entry of a list is the end of a name; a text alone is a regular expression for
    all of it. What modules_to_save trains, and what is inside, gets no adapter.
    """
    pattern = rf"(.*\.)?{re.escape(entry)}"
    if isinstance(lora.target_modules, str):
        is_all = entry.lower() == "all-linear"
        if is_all and not module.is_inner_linear:
            return False
        pattern = ".*" if is_all else entry

    def matches(name: str) -> bool:
        if name.rpartition(".")[2] in lora.exclude_modules:
            return False
        saved = (rf"(^|.*\.){entry}($|\..*)" for entry in lora.modules_to_save)
        is_saved = any(re.match(inside, name) for inside in saved)
        return not is_saved and re.fullmatch(pattern, name) is not None

    return _in_every_layer(f"lora.target_modules = {shown(entry)}", module, matches)


def resolve_targets(lora: LoraConfig, base_tree: Mapping[str, Any]) -> set[str]:
    """Labels of modules that get an adapter: "self_attn.q_proj" in layers, and ends.

    These are "embed_tokens" and "lm_head". Where one adapter shall act in both, it is
    embed_tokens' alone. `base_tree`: parameters, or anything with their shapes.

    Raises:
        ValueError: an entry matches nothing, only some layers, or what takes no
            adapter.
    """
    modules = list(iterate_modules(base_tree))
    available = sorted({module.name for module in modules if module.takes_adapter})
    if lora.bias == "all" and parameters.has_biases(base_tree):
        raise ValueError(
            "lora.bias = 'all': PEFT would train the biases of this model's router and"
            " experts too, which no adapter holds here; set it to 'lora_only' or 'none'"
        )
    targets = lora.target_modules
    found = {parameter.label for parameter in parameters.select(lora, base_tree)}
    for entry in [targets] if isinstance(targets, str) else targets:
        chosen = [module for module in modules if _is_target(lora, entry, module)]
        if refused := [m.label for m in chosen if not m.takes_adapter]:
            raise ValueError(
                f"lora.target_modules = {shown(entry)} selects {refused[0]}, which is"
                " neither a linear layer nor the embedding and takes no adapter:"
                f" choose from {available}{parameters.hint(base_tree)}"
            )
        if not chosen and not (found and isinstance(targets, str)):
            raise ValueError(
                f"lora.target_modules: {shown(entry)} matches no module of this model"
                f"{' outside modules_to_save' if lora.modules_to_save else ''}:"
                f" choose from {available}, or all-linear{parameters.hint(base_tree)}"
            )
        found |= {module.label for module in chosen}
    ends = {"embed_tokens", "lm_head"}
    if lora.ensure_weight_tying and is_tied(base_tree) and found & ends:
        return found - ends | {"embed_tokens"}
    return found


def resolve_ranks(
    lora: LoraConfig, base_tree: Mapping[str, Any]
) -> dict[str, tuple[int, float]]:
    """(rank, scaling) of each module that `resolve_targets` selects.

    Raises:
        ValueError: a pattern matches none of them, or only some layers.
    """
    targets = resolve_targets(lora, base_tree)
    modules = {m.label: m.names for m in iterate_modules(base_tree)}
    modules |= {p.label: p.names for p in parameters.iterate_parameters(base_tree)}
    names = [name for label in targets for name in modules[label]]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not ends_one(pattern, names):
                raise ValueError(
                    f"lora.{key}: {shown(pattern)} matches no module that gets an"
                    f" adapter: choose from {sorted(targets)}"
                )
    ranks = {label: lora.rank_and_scaling(modules[label]) for label in targets}
    if ties_adapters(lora, base_tree):
        head = lora.rank_and_scaling(("lm_head",))
        if lora.use_dora or head != ranks["embed_tokens"]:
            raise ValueError(
                "lora.ensure_weight_tying = True: the adapter of embed_tokens is the"
                " head's too, so use_dora, and a rank_pattern or alpha_pattern that"
                " tells them apart, have no meaning there: unset one of these"
            )
    return ranks


def make_shape(lora: LoraConfig, base_tree: Mapping[str, Any]) -> LoraShape:
    """The adapters of a decoder with these weights.

    Raises:
        ValueError: the settings do not fit the weights.
    """
    ranks = resolve_ranks(lora, base_tree)
    return LoraShape(
        r=lora.r,
        scaling=lora.scaling(lora.r, lora.alpha),
        dropout=lora.dropout,
        targets=frozenset(ranks),
        own=tuple((path, *rank) for path, rank in sorted(ranks.items())),
        use_dora=lora.use_dora,
        ties_head=ties_adapters(lora, base_tree),
    )


def resolve_modules_to_save(
    lora: LoraConfig, base_tree: Mapping[str, Any]
) -> set[TreePath]:
    """Paths that `modules_to_save` trains in full, by PEFT's rule: a name's ending.

    Raises:
        ValueError: an entry matches nothing, or only some layers.
    """
    modules = [m for m in iterate_modules(base_tree) if "tied" not in m.leaves]
    paths: set[TreePath] = set()
    for entry in lora.modules_to_save:
        key = f"lora.modules_to_save = {shown(entry)}"
        found = {
            module.path
            for module in modules
            if _in_every_layer(key, module, operator.methodcaller("endswith", entry))
        }
        if not found and entry == "lm_head":
            raise ValueError(
                f"{key}: this model's head is its embedding (tie_word_embeddings); name"
                " embed_tokens, which trains both as one"
            )
        if not found:
            raise ValueError(
                f"lora.modules_to_save: {shown(entry)} matches no module of this model:"
                f" choose from {sorted({module.name for module in modules})}"
            )
        if any("experts" in (*path, *tree_get(base_tree, path)) for path in found):
            raise ValueError(
                f"{key} selects the experts, which PEFT and the hub store in different"
                " forms; to train them set lora.enabled = False. Their router can be"
                " saved: name mlp.gate"
            )
        if parameters.has_biases(base_tree) and any("gate" in path for path in found):
            raise ValueError(
                f"{key} selects this model's router, which PEFT knows by another name:"
                " leave it out, or train all weights (lora.enabled = False)"
            )
        paths |= found
    return paths
