"""Regular expressions of module names, as PEFT's settings hold them."""

import contextlib
import re
from collections.abc import Iterable, Iterator


class LayersDifferError(ValueError):
    """A setting tells layers apart; `problem` is without the advice to who sets it."""

    def __init__(self, problem: str, advice: str) -> None:
        self.problem = f"{problem}, but layers are stacked and train alike"
        super().__init__(f"{self.problem}: {advice}")


@contextlib.contextmanager
def explained(adapter: str | None) -> Iterator[None]:
    """Say of an adapter that is trained, and has such a setting, what can be done.

    Args:
        adapter: its folder; None where adapters are new.
    """
    try:
        yield
    except LayersDifferError as error:
        if not adapter:
            raise
        raise ValueError(
            f"adapter {adapter}: {error.problem}: merge it with PEFT"
            " (merge_and_unload) and load the merged model"
        ) from error


def ends_one(pattern: str, names: Iterable[str]) -> bool:
    """PEFT's rule for patterns of ranks: a regular expression of a name's end."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def why_none(pattern: str, *, whole: bool = False) -> str | None:
    """Why a text is no regular expression of names; None where it is one.

    Unless it is for `whole` names it is compiled inside of another, as it will be used:
    it may then not begin with flags, which stand at the very beginning only.
    """
    try:
        re.compile(pattern if whole else f"({pattern})$")
    except RecursionError:
        return "nested too deeply"
    except (re.error, OverflowError) as error:
        return str(error)
    return None
