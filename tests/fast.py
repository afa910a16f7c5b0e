"""What `bash tests/run.sh fast` leaves out beside the tests marked as long.

A contributor runs the fast tests while working. They touch every module of the package,
as `fast_test.py` shows; what is left out here repeats that with more compilation, more
processes or more variants.
"""

# Markers of pytest whose tests are not fast.
MARKERS = ("slow", "torch", "gpu", "on_request")
# Files, or tests by the beginning of their name, below tests/.
LEFT_OUT: tuple[str, ...] = ()


def is_fast(nodeid: str, markers: set[str]) -> bool:
    """Whether a test belongs to the fast ones.

    Args:
        nodeid: its name as pytest has it, from the repository's root.
    """
    name = nodeid.removeprefix("tests/")
    return not markers & {*MARKERS} and not name.startswith(LEFT_OUT)
