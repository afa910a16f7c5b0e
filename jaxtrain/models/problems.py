"""Several things that are wrong, reported as one error."""

import contextlib
from collections.abc import Iterable, Iterator


class Problems:
    """Lines, each naming a place, a value and a fix; one ValueError in the end."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines = list(lines)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note a ValueError that is raised within, in place of passing it on."""
        try:
            yield
        except ValueError as error:
            self.lines += str(error).splitlines()

    def check(self) -> None:
        """Raise ValueError with every line noted so far, if there is one."""
        if self.lines:
            raise ValueError("\n".join(dict.fromkeys(self.lines)))
