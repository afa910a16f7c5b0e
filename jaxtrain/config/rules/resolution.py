"""The sections of a run while rules settle them, and what the rules say about them."""

from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from typing import Any

from jaxtrain import schema
from jaxtrain.config import peer_keys, sections
from jaxtrain.config.notes import Kind, Note
from jaxtrain.config.sections import GENERAL_KEYS, SCHEMA, TrainingType
from jaxtrain.objectives.options import ObjectiveRow, objective_row
from jaxtrain.record.safe_text import shown
from jaxtrain.schema import build
from jaxtrain.tree import dotted, get, nest

_AS_SET = object()
_MOST_LINES = 50  # of a message


class ConfigError(ValueError):
    """All problems of a configuration, one `key = value: problem; fix` a line."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (
            problems.splitlines() if isinstance(problems, str) else list(problems)
        )
        more = len(self.problems) - _MOST_LINES
        rest = [f"and {more} problems more"] if more > 0 else []
        super().__init__("\n".join([*self.problems[:_MOST_LINES], *rest]))


class Resolution:
    """The sections of one run, and the problems and notes that rules collect.

    A section holds what was set for the run until a rule settles it. Rules name a
    general training key without `training.`, as in "deepspeed.zero_stage". `general`
    maps each to its value, `origin` to the full key that gave it; `unset` holds those
    that nobody set. `flags` are the full keys that the command line set.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        device_count: int | None,
        flags: Collection[str] = (),
    ) -> None:
        self.values, refused = schema.merge(SCHEMA, given, peer_keys.suggest)
        self.problems = list(refused.values())
        self.refused = set(refused)
        self.notes: list[Note] = []
        self.device_count = device_count
        self.flags = frozenset(flags)
        training = self.values["training"]
        self.training_type: TrainingType = training["training_type"]
        self.lora = build(sections.LoraSection, training["lora"])
        self.dpo = build(sections.DpoSection, training["dpo"])
        self.general: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.unset: set[str] = set()
        _take_precedence(self)
        general = nest({tuple(key.split(".")): x for key, x in self.general.items()})
        self.optimizer = build(sections.OptimizerSection, general)
        self.schedule = build(sections.ScheduleSection, general)
        self.precision = build(sections.PrecisionSection, general)
        self.loop = build(sections.LoopSection, general)
        self.devices = build(sections.DevicesSection, general)
        self.curriculum = build(sections.CurriculumSection, general["curriculum"])
        self.generation = build(sections.GenerationSection, general["generation"])
        self.compilation_cache = build(
            sections.CompilationCacheSection, general["compilation_cache"]
        )
        self.profile = build(sections.ProfileSection, general["profile"])
        self.model = build(sections.ModelSection, self.values["model"])
        self.data = build(sections.DataSection, self.values["data"])
        self.mesh = build(sections.MeshSection, self.values["mesh"])

    @property
    def is_dpo(self) -> bool:
        """Whether the rows are pairs, or halves of them."""
        return self.training_type == "dpo"

    @property
    def has_adapters(self) -> bool:
        """Whether only adapters train; from_scratch refuses them."""
        asked = self.lora.enabled and self.training_type != "from_scratch"
        return self.training_type == "lora" or bool(asked)

    @property
    def row(self) -> ObjectiveRow | None:
        """The facts about the objective, None for an unknown one."""
        return objective_row(self.loop.objective, on_pairs=self.is_dpo)

    def problem(
        self, key: str, text: str, *, value: Any = _AS_SET, causes: Iterable[str] = ()
    ) -> None:
        """Add a problem, unless it follows from one that was found already.

        Args:
            key: the key to complain about; the message names its full key.
            text: "what is wrong with it; what to set instead".
            value: the value to show, where it is not the one that was set.
            causes: other keys whose values the complaint rests on. A key that was
                refused for its type or bounds holds its default, which nobody chose:
                a complaint about it, or because of it, would be false.
        """
        if any(self.is_refused(name) for name in (key, *causes)):
            return
        if value is _AS_SET:
            is_general = key in self.general
            value = self.general[key] if is_general else get(self.values, key)
        self.problems.append(
            f"{self.origin.get(key, key)} = {schema.shown(value)}: {text}"
        )

    def is_refused(self, key: str) -> bool:
        """Whether the key, or a section around it, had a value that can't be used."""
        parts = self.origin.get(key, key).split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return not self.refused.isdisjoint(paths)

    def is_set(self, key: str) -> bool:
        """Whether a full key was set by a flag, or to other than its default."""
        is_default = get(self.values, key) == get(SCHEMA, key).default
        return key in self.flags or not is_default

    def note_gives_way(self, key: str, winner: str, winning: Any) -> None:
        """Note that a full key does not count, and which one does."""
        fix = f"set {winner}, or remove that"
        self.note(key, f"{winner} = {shown(winning)}", fix, kind="overruled")

    def note(
        self,
        key: str,
        reason: str,
        fix: str = "remove the flag",
        *,
        kind: Kind = "inactive",
    ) -> None:
        """Note that a full key does not act; a flag that doesn't is a problem."""
        note = Note(kind, key, get(self.values, key), reason)
        if key in self.flags:
            self.problems.append(f"{note}; {fix}")
        else:
            self.notes.append(note)

    def note_ineffective(self) -> None:
        """Name the keys that were set and that the settled run does not read."""
        noted = {note.key for note in self.notes}
        for key, leaf in dotted(SCHEMA).items():
            if key in noted or not self.is_set(key):
                continue
            for fact in leaf.all(schema.NoEffect):
                self.note(key, fact.instead, kind="foreign")
            for condition in leaf.all(schema.OnlyIf):
                own = key.endswith(condition.key.removeprefix("training"))
                if own:
                    continue  # the switch of its own section
                if why := condition.reason(self.settled(condition.key)):
                    self.note(key, why, self._acting_instead(key, condition))
                    break

    def settled(self, key: str) -> Any:
        """What a full key is in the run, once the rules have settled it."""
        path = key.removeprefix("training.").split(".")
        for name in sections.TRAINING_SECTIONS:
            if hasattr(getattr(self, name), path[0]):
                path.insert(0, name)
                break
        return reduce(getattr, path, self)

    def _acting_instead(self, key: str, condition: schema.OnlyIf) -> str:
        """What to do about a flag that does not act."""
        _, _, name = key.removeprefix("training.").partition(".")
        if name in GENERAL_KEYS and condition.key == "training.training_type":
            return f"set training.{name}"
        if condition.value is not True or isinstance(condition, schema.Unless):
            return f"remove the flag, or change {condition.key}"
        is_switch = schema.storage_type(get(SCHEMA, condition.key).hint) is bool
        wanted = f"{condition.key} = true" if is_switch else condition.key
        return f"set {wanted} too, or remove the flag"


def _take_precedence(run: Resolution) -> None:
    """Fill `general`, `origin` and `unset`.

    The block of the active training type goes before `training`, and `training` before
    the type's default.
    """
    prefix, training = f"training.{run.training_type}", run.values["training"]
    shared = {key: get(training, key) for key in GENERAL_KEYS}
    block = {key: get(training[run.training_type], key) for key in GENERAL_KEYS}
    type_defaults = dict(sections.TYPE_DEFAULTS[run.training_type])
    if run.has_adapters:
        rate = sections.LORA_LEARNING_RATES[run.training_type]
        type_defaults["learning_rate"] = rate
    _take_warmup_from_one_place(shared, block, run)
    for key in GENERAL_KEYS:
        value, in_block = block[key], f"{prefix}.{key}"
        usual = get(SCHEMA["training"], key).default
        if value is not None and shared[key] not in (value, usual):
            run.note_gives_way(f"training.{key}", in_block, value)
        wins = value is not None or run.is_refused(in_block)
        run.origin[key] = in_block if wins else f"training.{key}"
        value = shared[key] if value is None else value
        if value is None:
            value = type_defaults.get(key)
            run.unset.add(key)
        run.general[key] = value


def _take_warmup_from_one_place(
    shared: dict[str, Any], block: dict[str, Any], run: Resolution
) -> None:
    """A block that sets one of the two warm-up keys decides both.

    Otherwise a general warmup_steps would overrule a block's warmup_ratio.
    """
    pair = ("warmup_steps", "warmup_ratio")
    deciding = shared
    for one, other in (pair, pair[::-1]):
        if block[one] is not None:
            deciding = block
            if shared[other] and block[other] is None:
                winner = f"training.{run.training_type}.{one}"
                run.note_gives_way(f"training.{other}", winner, block[one])
                shared[other] = None
    if any(deciding[key] is not None for key in pair):
        for key in pair:
            deciding[key] = deciding[key] or 0
