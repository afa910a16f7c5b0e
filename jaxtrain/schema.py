"""Dataclass fields as configuration keys. It knows types and bounds, but no key's name.

A frozen dataclass is a section. The annotation of a field says what the key may hold,
and its default what it holds if nobody sets it. `None` means "unset" everywhere. From
these come the `ConfigDict` that the command line overrides, every check of what was
set, and docs/configuration.md.
"""

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union

from ml_collections import ConfigDict, FieldReference

from jaxtrain.record.safe_text import cut, shown
from jaxtrain.tree import dotted, flatten, get, nest

T = TypeVar("T")

# What a message shows of the names in a section, and of many mistakes.
_MOST_NAMES = 12
_MOST_SUGGESTIONS = 50


@dataclasses.dataclass(frozen=True)
class Bound:
    """An interval of numbers; `open_*` leaves the end point out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low:.15g}, {self.high:.15g}{right}"


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """The names of a table, looked up whenever a value is checked."""

    table: Mapping[str, Any]

    def __contains__(self, value: str) -> bool:
        return value in self.table

    def __str__(self) -> str:
        return f"one of {', '.join(self.table)}"


@dataclasses.dataclass(frozen=True, eq=False)
class OwnName(OneOf):
    """A part of the user's own, as `module:function` or `module:Class`."""

    table: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __contains__(self, value: str) -> bool:
        module, _, name = value.partition(":")
        return all(part.isidentifier() for part in (*module.split("."), name))

    def __str__(self) -> str:
        return "module:function"


# What devices compute with: float32, and integers of 32 bits but where a bound is set.
_MOST = {int: 2**31 - 1, float: 3.4028234663852886e38}
Own = Annotated[str, OwnName()]
PositiveInt = Annotated[int, Bound(1)]
NonNegativeInt = Annotated[int, Bound(0)]
Positive = Annotated[float, Bound(0, open_low=True)]
NonNegative = Annotated[float, Bound(0)]
Fraction = Annotated[float, Bound(0, 1)]
FractionBelowOne = Annotated[float, Bound(0, 1, open_high=True)]


@dataclasses.dataclass(frozen=True)
class OnlyIf:
    """The condition without which setting a key has no effect.

    The resolved value of `key`, a full key, must be `value` (`True`: any true value; a
    tuple: one of these). `otherwise` is the reason that the log gives where it is not.
    """

    key: str
    value: object = True
    otherwise: str = ""

    def holds(self, found: Any) -> bool:
        """Whether the condition is met if `key` is `found`."""
        if isinstance(self.value, tuple):
            return found in self.value
        return bool(found) if self.value is True else found == self.value

    def reason(self, found: Any) -> str:
        """Why a key has no effect if `key` is `found`; "" if it has."""
        if self.holds(found):
            return ""
        is_unset = found is None or found in ("", ())
        shown = "unset" if is_unset else found
        shown = str(shown).lower() if isinstance(shown, bool) else shown
        return self.otherwise or f"{self.key.removeprefix('training.')} is {shown}"

    def describe(self) -> str:
        """The condition as a sentence of the documentation."""
        if isinstance(self.value, tuple):
            return f"Only with {self.key} {' or '.join(map(str, self.value))}."
        shown = str(self.value).lower() if self.value is False else self.value
        state = "" if self.value is True else f" {shown}" if shown else " unset"
        return f"Only with {self.key}{state}."


@dataclasses.dataclass(frozen=True)
class Unless(OnlyIf):
    """The opposite: setting a key has no effect if `key` is `value`."""

    def holds(self, found: Any) -> bool:
        """Whether the condition is met if `key` is `found`."""
        return not super().holds(found)

    def describe(self) -> str:
        """The condition as a sentence of the documentation."""
        state = "" if self.value is True else f" {self.value}"
        return f"Not with {self.key}{state}."


@dataclasses.dataclass(frozen=True)
class NoEffect:
    """A key that is accepted for other programs' sake and does nothing here."""

    instead: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a number counts, for the documentation."""

    name: str


class ForShares:
    """The key that a share of what this one counts is set by."""

    def __init__(self, key: str) -> None:
        self.key = key


class ByType:
    """The default of a DERIVED key for each training type, in their order."""

    def __init__(self, *values: Any) -> None:
        self.values = values


class ReadBy:
    """The options of another key that read this one; others would ignore it."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One key: its annotation, its default (None: unset), and facts beside these."""

    hint: Any
    default: Any
    shared: tuple[Any, ...] = ()

    def all(self, kind: type[T]) -> list[T]:
        """The facts of one kind, such as `Unit`; the shared ones first."""
        facts = self.shared + getattr(self.hint, "__metadata__", ())
        return [fact for fact in facts if isinstance(fact, kind)]


# The default of a field that is unset in a configuration but never in a resolved run:
# a default by training type, or other keys' values, take its place.
DERIVED: Any = None

Schema: TypeAlias = dict[str, Any]  # of Leaf, or of Schema for a section
# An unknown name, the prefix of the section it stands in, and that section -> a fix.
Suggest: TypeAlias = Callable[[str, str, Schema], str]


def schema_of(section: type) -> Schema:
    """The keys of a dataclass; a field that is itself a dataclass is a sub-section.

    A class attribute `ONLY_IF` is a condition of every key of the section.
    """
    hints = typing.get_type_hints(section, include_extras=True)
    shared = (section.ONLY_IF,) if hasattr(section, "ONLY_IF") else ()
    return {
        field.name: schema_of(hints[field.name])
        if dataclasses.is_dataclass(hints[field.name])
        else Leaf(hints[field.name], field.default, shared)
        for field in dataclasses.fields(section)
    }


def unset(schema: Schema, *facts: Any) -> Schema:
    """The same keys with no default, and with more facts, which come first."""
    leaves = flatten(schema).items()
    return nest(
        {path: Leaf(leaf.hint, None, facts + leaf.shared) for path, leaf in leaves}
    )


def to_config_dict(schema: Schema) -> ConfigDict:
    """The defaults as a ConfigDict whose every key the command line can override."""

    def stored(leaf: Leaf) -> Any:
        storage = storage_type(leaf.hint)
        # Only a FieldReference can be None now and typed later, or hold several types.
        typed = leaf.default is not None and storage is not object
        return leaf.default if typed else FieldReference(leaf.default, storage)

    leaves = flatten(schema).items()
    return ConfigDict(nest({path: stored(leaf) for path, leaf in leaves}))


def copy_config(config: ConfigDict) -> ConfigDict:
    """A copy whose values share nothing with the config's, references resolved.

    A deep copy would make ConfigDicts of mappings, whose names may have no dots.
    """
    fresh = ConfigDict()
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, FieldReference):
            fresh[name] = FieldReference(None, value.get_type())
            value = value.get()
        is_section = isinstance(value, ConfigDict)
        fresh[name] = copy_config(value) if is_section else copy.deepcopy(value)
    return fresh.lock() if config.is_locked else fresh


def overlay(
    config: ConfigDict,
    schema: Schema,
    given: Mapping[str, Any],
    suggest: Suggest | None = None,
) -> list[str]:
    """Set on `config` what `given` holds; return a line for each key it can't set.

    Args:
        suggest: what to do about a key that is unknown; by default a near name.
    """
    problems: dict[str, str] = {}
    suggest = suggest or near_name(schema)
    for path, value in _check(schema, given, "", problems, suggest):
        if value is not None:
            get(config, path[:-1])[path[-1]] = value
    return list(problems.values())


def merge(
    schema: Schema, given: Mapping[str, Any], suggest: Suggest | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Checked values of every key, defaults where unset; and the refused keys.

    Each refused key has a line that describes its problem. It keeps its default, so
    that later checks still run. `suggest` is that of `overlay`.
    """
    problems: dict[str, str] = {}
    values = defaults(schema)
    suggest = suggest or near_name(schema)
    for path, value in _check(schema, given, "", problems, suggest):
        get(values, path[:-1])[path[-1]] = value
    return values, problems


def defaults(schema: Schema) -> dict[str, Any]:
    """Every key's default, as nested plain dicts."""
    return nest({path: leaf.default for path, leaf in flatten(schema).items()})


def build(section: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass from checked values, sub-sections included."""
    hints = typing.get_type_hints(section)
    return section(
        **{
            field.name: build(hints[field.name], values[field.name])
            if dataclasses.is_dataclass(hints[field.name])
            else values[field.name]
            for field in dataclasses.fields(section)  # type: ignore[arg-type]
        }
    )


def _check(
    schema: Schema,
    given: Mapping[str, Any],
    prefix: str,
    problems: dict[str, str],
    suggest: Suggest,
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, converted value) of each good key; describe the others."""
    for name, value in given.items():
        path = f"{prefix}{name}"
        entry = schema.get(name)
        if entry is None:
            fix = "docs/configuration.md has all keys"
            if len(problems) < _MOST_SUGGESTIONS:  # each takes milliseconds
                fix = suggest(str(name), prefix, schema)
            problems[path] = f"{cut(path)} = {shown(value)}: unknown key; {fix}"
        elif isinstance(entry, Leaf):
            is_unset = value is None and entry.default is None
            try:
                yield (name,), None if is_unset else convert(value, entry.hint)
            except ValueError as error:
                problems[path] = f"{path} = {shown(value)}: {error}"
        elif isinstance(value, Mapping):
            for below, converted in _check(entry, value, f"{path}.", problems, suggest):
                yield (name, *below), converted
        elif value is not None:  # an empty YAML section reads as null: nothing set
            problems[path] = (
                f"{path} = {shown(value)}: a section, not a value; set keys under it:"
                f" {_names(entry)}"
            )


def near_name(root: Schema) -> Suggest:
    """The suggestion of `suggest_key`, for `overlay` and `merge`."""
    return lambda name, prefix, section: suggest_key(name, prefix, section, root)


def suggest_key(name: str, prefix: str, schema: Schema, root: Schema) -> str:
    """A near name in this section, else in any section; else every name here.

    Outside of all sections the key of this very name, in whichever section, is nearer
    than a section of another name.
    """
    if not prefix and (leaf := by_last_part(root).get(name)):
        return f"did you mean {leaf}?"
    close = difflib.get_close_matches(name, schema, n=1, cutoff=0.7)
    close = close or [known for known in schema if known.endswith(f"_{name}")]
    if close:
        return f"did you mean {prefix}{close[0]}?"
    leaves = by_last_part(root)
    close = difflib.get_close_matches(name, leaves, n=1, cutoff=0.8)
    if close:
        return f"did you mean {leaves[close[0]]}?"
    return f"the keys here are {_names(schema)}"


def by_last_part(root: Schema) -> dict[str, str]:
    """The full key of each last part, a general key rather than one in a block."""
    paths = sorted(dotted(root), key=lambda path: path.count("."))
    return {path.rsplit(".", 1)[-1]: path for path in reversed(paths)}


def _names(schema: Schema) -> str:
    """The names in a section, the first of them where there are many."""
    names = list(schema)
    if len(names) <= _MOST_NAMES + 3:
        return ", ".join(names)
    more = len(names) - _MOST_NAMES
    return f"{', '.join(names[:_MOST_NAMES])} and {more} more (docs/configuration.md)"


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotation wants it, or ValueError "problem; fix".

    Takes an int for a float, a whole float for an int, a list for a tuple, a single
    number for a tuple of numbers, and a comma-separated text for a tuple of texts.
    Never a text for a number or a bool.
    """
    if _fits := _convert(value, hint):
        return _fits[0]
    wanted = describe(hint)
    most = _MOST.get(storage_type(hint), math.inf)
    is_number = type(value) in (int, float) and " in " not in wanted
    if is_number and abs(value) > most:
        raise ValueError(f"beyond {most:.10g}, as far as devices count; set less")
    for fact in typing.get_args(hint):
        if isinstance(fact, ForShares) and type(value) is float and 0 < value < 1:
            raise ValueError(f"not {wanted}; for a share set {fact.key} = {value:g}")
    number = isinstance(value, str) and storage_type(hint) in (int, float, bool)
    if number and _is_number(value):
        raise ValueError(f"a string, not {wanted}; write it without quotes")
    close = isinstance(value, str) and did_you_mean(value, _allowed_texts(hint))
    raise ValueError(f"not {wanted}; {close.rstrip() if close else 'set one'}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names what was probably meant, and a space; or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def parse(text: str, hint: Any, read: Callable[[str], Any]) -> Any:
    """The value that a text of the command line stands for, or ValueError as `convert`.

    Args:
        read: reads a number, true or false, a list or a mapping out of a text. Only a
            text with a bracket is read where the key may hold a text itself, so that
            a run_name of 007 stays one.
    """
    holds_text = _convert(text, hint) is not None
    if holds_text and not text.startswith(("[", "(", "{")):
        return convert(text, hint)
    value = read(text)
    if holds_text and value == text and (_convert({}, hint) or _convert([], hint)):
        raise ValueError(
            "begins with a bracket, but is no list and no mapping: look at brackets,"
            " quotes, colons and commas; a path of that name is ./ and the name"
        )
    if holds_text and _convert(value, hint) is None:
        value = text
    elif isinstance(value, str):
        listed = read(f"[{text}]")
        if not isinstance(listed, str) and _convert(listed, hint):
            value = listed  # numbers with commas between them
    return convert(value, hint)


def describe(hint: Any) -> str:
    """What a key may hold, in words: "an integer >= 1", "one of a, b"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        checks = [fact for fact in arguments[1:] if isinstance(fact, Bound | OneOf)]
        names_all = any(isinstance(check, OneOf) for check in checks)
        kind = [] if names_all else [describe(arguments[0])]
        return " ".join([*kind, *map(str, checks)])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in arguments if arm is not type(None))
    if origin is tuple:
        return f"a list, each item {describe(arguments[0])}"
    if origin is dict:
        return "a mapping of names to values, its numbers finite"
    names = {bool: "true or false", int: "an integer", float: "a number"}
    names |= {str: "a string"}
    return names[hint]


def _convert(value: Any, hint: Any) -> tuple[Any] | None:
    """The converted value in a 1-tuple, or None if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        checks = [fact for fact in arguments[1:] if isinstance(fact, Bound | OneOf)]
        fits = _convert(value, arguments[0])
        is_bounded = any(isinstance(c, Bound) and c.high < math.inf for c in checks)
        if arguments[0] is int and not is_bounded:
            checks.append(Bound(-_MOST[int], _MOST[int]))
        if fits and fits[0] is not None and any(fits[0] not in c for c in checks):
            return None
        return fits
    if origin is Literal:
        same_type = type(value) is type(arguments[0])  # True is no stage 1
        return (value,) if same_type and value in arguments else None
    if origin in (Union, types.UnionType):
        arms = (_convert(value, arm) for arm in arguments)
        return next((fits for fits in arms if fits), None)
    if origin is tuple:
        return _convert_items(value, arguments[0])
    if origin is dict:
        if isinstance(value, ConfigDict):
            value = value.to_dict()
        is_plain = isinstance(value, Mapping) and _is_plain(value)
        return (dict(value),) if is_plain else None
    if hint is float:
        is_number = type(value) in (int, float) and abs(value) <= _MOST[float]
        return (float(value),) if is_number else None
    if hint is int and isinstance(value, float) and value.is_integer():
        return (int(value),)
    return (value,) if type(value) is hint else None


def _is_plain(tree: Any, depth: int = 20) -> bool:
    """Whether a mapping's keys are texts and its numbers finite, and it is not deep."""
    if isinstance(tree, float):
        return math.isfinite(tree)
    if not isinstance(tree, Mapping | list | tuple):
        return True
    if isinstance(tree, Mapping) and not all(isinstance(name, str) for name in tree):
        return False
    below = tree.values() if isinstance(tree, Mapping) else tree
    return depth > 0 and all(_is_plain(each, depth - 1) for each in below)


def _convert_items(value: Any, hint: Any) -> tuple[Any] | None:
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    elif type(value) in (int, float) and hint in (int, float):
        value = [value]
    if not isinstance(value, Sequence):
        return None
    items = [_convert(item, hint) for item in value]
    return (tuple(fits[0] for fits in items if fits),) if all(items) else None


def storage_type(hint: Any) -> type:
    """The type a ConfigDict holds the key as; `object` takes any literal."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return storage_type(arguments[0])
    if origin is Literal:
        return type(arguments[0])
    if origin in (Union, types.UnionType):
        arms = [arm for arm in arguments if arm is not type(None)]
        return storage_type(arms[0]) if len(arms) == 1 else object
    return hint if hint in (bool, int, float, str) else object


def _allowed_texts(hint: Any) -> list[str]:
    if isinstance(hint, OneOf):
        return list(hint.table)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return [str(item) for item in arguments]
    return [text for arm in arguments for text in _allowed_texts(arm)]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return text.lower() in ("true", "false")
