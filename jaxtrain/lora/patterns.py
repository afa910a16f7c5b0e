"""Regular expressions of module names, as PEFT's settings hold them."""

import re
from collections.abc import Iterable


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
