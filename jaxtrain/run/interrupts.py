"""Ctrl-C, also where a library swallows it.

Python raises KeyboardInterrupt wherever the program is. Some libraries catch everything
while they import or load, and the program would go on as if nobody had pressed a key.
So the key press is noted, and asked for again between the parts of a run.
"""

import signal
from types import FrameType

_pressed = False


def watch() -> None:
    """Note every SIGINT from now on; it raises KeyboardInterrupt as before."""
    signal.signal(signal.SIGINT, _note)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and the program still runs."""
    if _pressed:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
