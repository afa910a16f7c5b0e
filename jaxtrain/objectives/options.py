"""The options of every objective, and the facts about objectives and losses.

Nothing here computes: the configuration, which never imports jax, reads this module
too. The functions of the same names stand in `preference_losses.py` (losses of pairs)
and are listed in `table.py` (objectives). The annotation of a field is the type and the
bounds of an option, as in a section of the configuration.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from jaxtrain import schema
from jaxtrain.schema import Fraction, FractionBelowOne, NonNegative, OneOf, Positive

FractionBelowHalf = Annotated[float, schema.Bound(0, 0.5, open_high=True)]


# --- losses of preference pairs ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """The facts about one loss of preference pairs.

    Attributes:
        reads: the options that this loss reads and others may not. Each loss reads
            `beta` if it wants to.
        f_divergence: whether the loss has a form for every f-divergence. It must be a
            function of the margin s_c - s_r alone, in which beta log Z(x) cancels.
        sorts: whether the loss sorts the pairs of a micro-batch, so that no entry of
            its result belongs to one pair.
    """

    reads: tuple[str, ...] = ()
    f_divergence: bool = False
    sorts: bool = False


_SMOOTHED = ("label_smoothing",)
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(("conservative_smoothing",), f_divergence=True),
    "hinge": PairLoss(f_divergence=True),
    "ipo": PairLoss(f_divergence=True),
    "exo_pair": PairLoss(_SMOOTHED, f_divergence=True),
    "nca_pair": PairLoss(),
    "robust": PairLoss(_SMOOTHED, f_divergence=True),
    "bco_pair": PairLoss(),
    "sppo_hard": PairLoss(),
    "aot": PairLoss(_SMOOTHED, sorts=True),
    "aot_unpaired": PairLoss(_SMOOTHED, sorts=True),
    "apo_zero": PairLoss(),
    "apo_down": PairLoss(),
    "discopop": PairLoss(("discopop_tau",), f_divergence=True),
    "sft": PairLoss(f_divergence=True),
    "sigmoid_norm": PairLoss(f_divergence=True),
}


# --- options, a dataclass for each objective --------------------------------------

# The option at fault, the other one that was judged with it, the problem, and a fix.
Contradiction = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Options:
    """What an objective can be told; next_token, nothing. Fields have the defaults."""

    def contradictions(self) -> Iterator[Contradiction]:
        """What these values, each good by itself, cannot mean together."""
        yield from ()


FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclasses.dataclass(frozen=True)
class PreferenceOptions(Options):
    """Options of the DPO family, named as in TRL and with TRL's defaults.

    The text below an option is its documentation, in docs/configuration.md too.
    """

    beta: Positive = 0.1
    """Strength of the tie to the reference."""
    loss_type: tuple[Annotated[str, OneOf(PAIR_LOSSES)], ...] = ("sigmoid",)
    """One loss or several."""
    loss_weights: tuple[float, ...] | None = None
    """A factor for each loss_type. Unset: every factor is 1."""
    label_smoothing: FractionBelowOne = 0.0
    """The probability of a flipped label: robust (below 0.5), exo_pair, aot and
    aot_unpaired."""
    conservative_smoothing: FractionBelowHalf = 0.0
    """The same for sigmoid (cDPO). TRL has no such option."""
    discopop_tau: Positive = 0.05
    """discopop."""
    reference_free: bool = False
    """The reference is uniform, its log-probs count as 0: there is no second model."""
    precompute_ref_log_probs: bool = False
    """Score the reference once, before training, into <workdir>/reference, which frees
    its memory. The batch then holds its sums."""
    f_divergence_type: FDivergence = "reverse_kl"
    """The divergence from the reference (arXiv:2309.16240)."""
    f_alpha_divergence_coef: Annotated[
        float, schema.OnlyIf("training.dpo.f_divergence_type", "alpha_divergence")
    ] = 0.5
    """alpha_divergence."""
    ld_alpha: Fraction | None = None
    """Weight of the tokens beyond the shorter completion, for the policy and the
    reference alike (LD-DPO, arXiv:2409.06411). Unset: 1."""
    use_weighting: bool = False
    """Weigh pairs by their likelihood under the policy (WPO, arXiv:2406.11827)."""

    def contradictions(self) -> Iterator[Contradiction]:
        """What the losses, their options and the reference cannot mean together."""
        names, weights = self.loss_type, self.loss_weights
        if not names:
            fix = "name at least one, such as 'sigmoid'"
            yield "loss_type", "loss_type", "no loss", fix
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                fix = "list it once, with the sum of its weights"
                yield "loss_type", "loss_type", f"{name!r} is listed twice", fix
        if weights is not None and len(weights) != len(names):
            problem = f"{len(weights)} weights for {len(names)} loss_type"
            yield "loss_weights", "loss_type", problem, "give one weight for each"
        yield from self._unread_options()
        if "exo_pair" in names and self.label_smoothing == 0:
            problem = "exo_pair takes its logarithm"
            yield "label_smoothing", "loss_type", problem, "set 1e-3 or so"
        if "robust" in names and self.label_smoothing >= 0.5:
            problem = "robust divides by 1 - 2 label_smoothing"
            yield "label_smoothing", "loss_type", problem, "set it below 0.5"
        having = sorted(name for name, loss in PAIR_LOSSES.items() if loss.f_divergence)
        lacking = sorted({*names} - {*having})
        if lacking and self.f_divergence_type != "reverse_kl":
            problem = f"{lacking} have only reverse_kl's form"
            fix = f"set 'reverse_kl', or losses of {having}"
            yield "f_divergence_type", "loss_type", problem, fix
        if self.use_weighting and any(PAIR_LOSSES[name].sorts for name in names):
            problem = "aot losses sort the batch: no pair has a weight"
            fix = "set it false, or remove the aot losses"
            yield "use_weighting", "loss_type", problem, fix
        if self.reference_free and self.precompute_ref_log_probs:
            problem = "reference_free is true: no reference"
            yield "precompute_ref_log_probs", "reference_free", problem, "set it false"
        if self.precompute_ref_log_probs and self.ld_alpha is not None:
            problem = (
                "it weighs the reference's log-prob of each token, and"
                " precompute_ref_log_probs keeps only their sums"
            )
            fix = "unset it, or set precompute_ref_log_probs = false"
            yield "ld_alpha", "precompute_ref_log_probs", problem, fix

    def _unread_options(self) -> Iterator[Contradiction]:
        """Options that are set, and none of the listed losses would do a thing."""
        losses = sorted(self.loss_type)
        keys = (key for row in PAIR_LOSSES.values() for key in row.reads)
        for key in dict.fromkeys(keys):
            readers = sorted(n for n, row in PAIR_LOSSES.items() if key in row.reads)
            is_set = getattr(self, key) != getattr(PreferenceOptions, key)
            if is_set and losses and not {*losses} & {*readers}:
                fix = f"remove it, or add one of {', '.join(readers)}"
                yield key, "loss_type", f"loss_type {losses} does not read it", fix


@dataclasses.dataclass(frozen=True)
class OrpoOptions(Options):
    """`beta` is the weight of the odds ratio beside the NLL."""

    beta: NonNegative = 0.1


@dataclasses.dataclass(frozen=True)
class SimpoOptions(Options):
    """Options of SimPO, with its paper's beta.

    `cpo_alpha` is the weight of an NLL, `alpha` is AlphaPO's.
    """

    beta: Positive = 2.0
    label_smoothing: FractionBelowHalf = 0.0
    cpo_alpha: NonNegative = 0.0
    simpo_gamma: NonNegative = 0.5
    alpha: float = 0.0


@dataclasses.dataclass(frozen=True)
class CpoOptions(SimpoOptions):
    """Options of CPO, of which SimPO is one loss, with TRL's defaults."""

    beta: Positive = 0.1
    cpo_alpha: NonNegative = 1.0
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"

    def contradictions(self) -> Iterator[Contradiction]:
        """Only the two losses of a sigmoid can be smoothed."""
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            problem = f"loss_type {self.loss_type!r} does not read it"
            fix = "remove it, or set loss_type to sigmoid or simpo"
            yield "label_smoothing", "loss_type", problem, fix


@dataclasses.dataclass(frozen=True)
class KtoOptions(Options):
    """Options of KTO. The weights multiply the losses of the rows of their class."""

    beta: Positive = 0.1
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0
    precompute_ref_log_probs: bool = False


O = TypeVar("O", bound=Options)  # noqa: E741


def make_options(
    kind: type[O], given: Mapping[str, Any], refused: Collection[str] = ()
) -> tuple[O, list[tuple[str, str]]]:
    """Options with the given values, and every problem of these.

    Args:
        kind: the dataclass of an objective's options.
        given: values of any type. One that cannot be leaves the default in its place.
        refused: keys whose values were found bad before, and are not in `given`.

    Returns:
        The options, and pairs of a key and a line "key = value: problem; fix".
    """
    values, wrong = schema.merge(schema.schema_of(kind), given)
    options, problems = kind(**values), list(wrong.items())
    for key, other, problem, fix in options.contradictions():
        # In place of a refused value the options have a default, which nobody set.
        if not {key, other} & {*refused, *wrong}:
            problems.append((key, f"{key} = {values[key]!r}: {problem}; {fix}"))
    return options, problems


# --- objectives -------------------------------------------------------------------

RowKind = Literal["next_token", "preference", "labeled"]


@dataclasses.dataclass(frozen=True)
class ObjectiveRow:
    """The facts about one objective.

    Attributes:
        options: the dataclass of its options.
        row_kind: what it trains on. All but next_token are of training_type dpo.
        has_reference: whether it compares with a reference model, unless an option says
            that it does not.
        micro_batch_means: whether the loss and all metrics are means of the means of
            micro-batches, as in TRL, or else means over all tokens or rows of a step.
        packs: whether a packed row can hold several of its examples.
        scores_prompts: whether it reads log-probs that the loss mask leaves out.
    """

    options: type[Options]
    row_kind: RowKind
    has_reference: bool = False
    micro_batch_means: bool = True
    packs: bool = True
    scores_prompts: bool = False

    @property
    def keys_of_dpo(self) -> tuple[str, ...]:
        """The keys of `training.dpo` that are options of this objective."""
        names = tuple(field.name for field in dataclasses.fields(self.options))
        if self.options is PreferenceOptions:
            return names
        return tuple(key for key in ("beta", "label_smoothing") if key in names)


OBJECTIVES: dict[str, ObjectiveRow] = {
    "next_token": ObjectiveRow(Options, "next_token", micro_batch_means=False),
    "preference": ObjectiveRow(PreferenceOptions, "preference", has_reference=True),
    "orpo": ObjectiveRow(OrpoOptions, "preference", scores_prompts=True),
    "cpo": ObjectiveRow(CpoOptions, "preference"),
    "simpo": ObjectiveRow(SimpoOptions, "preference"),
    "kto": ObjectiveRow(KtoOptions, "labeled", has_reference=True),
}


def objective_row(name: str, *, on_pairs: bool) -> ObjectiveRow | None:
    """The row of an objective, None for an unknown name.

    The objective of the training type is `auto`. A function of the user's own, named
    as module:function, trains on the same rows with the same reference.
    """
    own = ":" in name
    if not own and name != "auto":
        return OBJECTIVES.get(name)
    if not on_pairs:
        return OBJECTIVES["next_token"]
    preference = OBJECTIVES["preference"]
    return dataclasses.replace(preference, micro_batch_means=not own, packs=not own)


def unknown_objective(name: str, *also: str) -> str:
    """The problem of a name that is neither in `OBJECTIVES` nor in `also`; its fix."""
    known = (*also, *OBJECTIVES)
    fix = f"{schema.did_you_mean(name, known)}use one of {', '.join(known)}"
    return f"no objective of that name; {fix}, or module:function"
