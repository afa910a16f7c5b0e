"""Parts of a run that are a user's own, named as `module:function` or `module:Class`.

The module must be importable: installed, in the working directory or on PYTHONPATH.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxtrain.schema import did_you_mean


def load_own(key: str, path: str) -> Callable[..., Any]:
    """Import what `module:name` names.

    Args:
        key: the key that names it, for messages.

    Raises:
        ValueError: no such module, it has nothing of that name, or that is no function
            and no class.
    """
    module_name, _, name = path.partition(":")
    where = f"{key} = {path!r}"
    if not module_name or not name:
        raise ValueError(f"{where}: write it as module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where}: {error}; install it, or put its folder on PYTHONPATH"
        ) from error
    found: Any = getattr(module, name, None)
    if callable(found):
        return found
    problem = f"{name} is not a function"
    if found is None:
        public = [attribute for attribute in vars(module) if attribute[0] != "_"]
        problem = f"{did_you_mean(name, public)}{module_name} has no {name}"
    raise ValueError(f"{where}: {problem}")


def bind_own(
    key: str, path: str, keywords: Mapping[str, Any] | None, *positional: str
) -> Callable[..., Any]:
    """Import a part, and see that it can be called as it will be.

    Args:
        keywords: `training.function_kwargs`, from which the part's own are taken.
        positional: the names of what it will be given, for the message.

    Returns:
        The part with its keyword arguments bound.

    Raises:
        ValueError: see `load_own`; or it does not take these arguments.
    """
    function, own = load_own(key, path), dict((keywords or {}).get(path) or {})
    try:
        inspect.signature(function).bind(*positional, **own)
    except TypeError as error:
        given = [*positional, *(f"{name}={value!r}" for name, value in own.items())]
        raise ValueError(
            f"{key} = {path!r}: {error}; it is called with ({', '.join(given)})"
        ) from None
    except ValueError:
        pass  # one written in C tells no signature

    def bound(*arguments: Any) -> Any:
        return function(*arguments, **own)

    return bound
