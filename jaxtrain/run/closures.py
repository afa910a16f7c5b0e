"""What a function computes, as text: its code's place, and all that it closes over.

Two functions of the same text are traced to the same program, given the same versions
of the libraries and the same sources of this package. So the text is a key to programs
that were traced before. What cannot be told for certain is refused.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Packages whose code a key tells by their versions, or by a hash of the sources.
KNOWN_PACKAGES = frozenset(
    {"jaxtrain", "jax", "jaxlib", "optax", "flax", "numpy", "ml_dtypes", "builtins",
     "functools", "math", "operator", "types", "typing", "collections", "itertools"}
)  # fmt: skip
_LITERALS = (bool, int, float, complex, str, bytes, range, type(None), type(...))


class UnknownCode(ValueError):
    """A function reaches code or data that no key can tell."""


def describe(value: Any) -> str:
    """All that `value`, usually a function, depends on.

    Raises:
        UnknownCode: it reaches code outside KNOWN_PACKAGES, or an object of a kind
            that is not known here.
    """
    return "\n".join(_lines(value, {}))


def _lines(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[str]:
    if isinstance(value, _LITERALS):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"as number {seen[id(value)][0]}"
        return
    seen[id(value)] = len(seen), value  # kept alive, so that no id comes twice
    parts: Iterator[Any]
    if isinstance(value, type):
        yield f"type {_name_of(value)}"
        return
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        yield _array(value)
        return
    label, parts = _open(value)
    yield f"{label} ("
    for part in parts:
        yield from _lines(part, seen)
    yield ")"


def _open(value: Any) -> tuple[str, Iterator[Any]]:
    """A word for a compound value, and the values that it is made of."""
    label = _name_of(type(value))
    if isinstance(value, enum.Enum):
        return f"{label} {value.name}", iter(())
    if isinstance(value, np.dtype | PartitionSpec):
        return f"{label} {value!r}", iter(())
    if isinstance(value, Mesh):
        kinds = [f"{d.platform} {d.device_kind} {d.id}" for d in value.devices.flat]
        return label, iter((dict(value.shape), kinds, str(value.axis_types)))
    if isinstance(value, NamedSharding):
        return label, iter((value.mesh, value.spec, value.memory_kind))
    if isinstance(value, Mapping):
        return label, (part for item in value.items() for part in item)
    if isinstance(value, set | frozenset):
        return label, iter(sorted(value, key=repr))
    if isinstance(value, list | tuple):
        return label, iter(value)
    if isinstance(value, functools.partial):
        return label, iter((value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return label, iter((value.__func__, value.__self__))
    if isinstance(value, types.BuiltinFunctionType):
        return f"{label} {_name_of(value)}", iter(())
    if isinstance(value, types.FunctionType):
        return _open_function(value)
    if hasattr(value, "__wrapped__"):  # what jit and its like make of a function
        return label, iter((value.__wrapped__,))
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return label, (getattr(value, field.name) for field in fields)
    raise UnknownCode(f"it reaches an object of {label}")


def _open_function(function: types.FunctionType) -> tuple[str, Iterator[Any]]:
    code = function.__code__
    place = f"function {_name_of(function)} line {code.co_firstlineno}"
    free = inspect.getclosurevars(function).nonlocals
    return place, iter((free, function.__defaults__, function.__kwdefaults__))


def _name_of(value: Any) -> str:
    """The full name of a class or a function.

    Raises:
        UnknownCode: it is not of one of the packages that are known.
    """
    module = getattr(value, "__module__", None) or "builtins"
    name = f"{module}.{getattr(value, '__qualname__', value)}"
    if module.partition(".")[0] not in KNOWN_PACKAGES:
        raise UnknownCode(f"it reaches {name}, whose code no key can tell")
    return name


def _array(value: Any) -> str:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        value = jax.random.key_data(value)
    host = np.asarray(value)
    if host.dtype == object:
        raise UnknownCode("it reaches an array of objects")
    digest = hashlib.blake2b(host.tobytes(), digest_size=16).hexdigest()
    return f"array {host.dtype} {host.shape} {digest}"
