"""How a command ends: one short message in place of a traceback, and an exit code.

    0    it did what it was asked to do
    1    the machine failed: disk full, device lost, out of memory
    2    the user can mend it: a flag, a key, a file, a row, weights that diverged
    75   SIGTERM came, a checkpoint is saved: start it again (EX_TEMPFAIL)
    130  Ctrl-C

An exception that is none of these is a bug of ours, or of a function that the user
wrote, and keeps its traceback. `--debug` shows every traceback. This module imports
nothing large: commands call it before they import jax.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from jaxtrain.record import logs
from jaxtrain.record.safe_text import escape_controls, is_unicode, mask_text
from jaxtrain.run import interrupts

MISTAKE, FAULT, INTERRUPTED = 2, 1, 130

# What the operating system says about a path that the user has named.
_MISTAKEN_PATHS = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
    errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
# What libraries that write checkpoints say in errors of other types.
_DISK_FULL = ("No space left on device", "Disk quota exceeded")
_FULL = (
    "the disk is full: make room, or set training.save_total_limit, and give the same"
    " command again"
)
_OUT_OF_MEMORY = (
    "the device has no memory left: lower training.per_device_train_batch_size (and"
    " raise gradient_accumulation_steps), set training.gradient_checkpointing = true,"
    " or training.cpu_offload = true"
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message that says how to go on."""


def run_command(
    command: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None
) -> int:
    """Call a command with its arguments; report what it raises; return its exit code.

    Args:
        command: takes the arguments, without `--debug`; None is exit code 0.
        arguments: those of the process if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if wrong := [each for each in given if not is_unicode(each)]:
        print(f"error: {_safe(ascii(wrong[0]))}: not UTF-8", file=sys.stderr)
        return MISTAKE
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _without_late_callbacks
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_late_reads
    try:
        if arguments is None:  # a command of its own, not one within a program
            logs.set_up(debug=debug)
            interrupts.watch()
        return command([each for each in given if each != "--debug"]) or 0
    except BrokenPipeError:  # `jaxtrain configs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except interrupts.Terminated:
        if arguments is None:
            _leave_at_once(interrupts.TEMPORARY)
        raise
    except (Exception, KeyboardInterrupt) as error:
        found = describe(error)
        if debug or found is None:
            print(_safe(traceback.format_exc()), file=sys.stderr, end="")
        if found is None:
            return FAULT
        code, message = found
        for line in _safe(message).splitlines():
            print(f"error: {line}", file=sys.stderr)
        if code == INTERRUPTED and arguments is None:
            _leave_at_once(code)
        return code


def _safe(message: str) -> str:
    """A message that may quote settings and data, as it may be shown."""
    return escape_controls(mask_text(message))


def _leave_at_once(code: int) -> None:
    """End the process without Python's own clearing up.

    A compilation that was interrupted may still run in a thread; clearing up beneath
    it ends in a segmentation fault. All files of a run are closed by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _without_late_callbacks(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """Print an exception that nothing caught, but for the echo of a failed save."""
    if not _is_echo(error):
        sys.__excepthook__(kind, error, where)


def _without_late_reads(late: "sys.UnraisableHookArgs") -> None:
    """Print what nothing could catch, but for the echo of a failed save or read."""
    if not _is_echo(late.exc_value):
        sys.__unraisablehook__(late)


def _is_echo(error: BaseException | None) -> bool:
    """Whether Orbax says again what it has raised or will raise.

    Where one write of a checkpoint fails, it closes its event loop, and each of the
    other writes complains of that from a thread of C++. Where one array cannot be
    read, it drops the reads of the others unfinished.
    """
    text = str(error)
    is_late_write = isinstance(error, RuntimeError) and text == "Event loop is closed"
    return is_late_write or text.startswith("Encountered error while reading array")


def describe(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message of an exception; None for a bug."""
    text = str(error).strip()
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, text or "interrupted"
    signs = [sign for sign in _DISK_FULL if sign in text]
    if signs or _is_disk_full(error):
        if not isinstance(error, OSError):
            # A library names the file before the reason, and its own source after it.
            text = text.partition(signs[0])[0] + signs[0]
        return FAULT, f"{_FULL} ({_first_line(text)})"
    if isinstance(error, MemoryError):
        return FAULT, "this machine has no memory left: load less data, or stream it"
    if isinstance(error, ConnectionError | TimeoutError):
        return FAULT, text
    if isinstance(error, OSError):
        # Without a number, it is a library's or our own word on a path or a name.
        code = MISTAKE if error.errno in (None, *_MISTAKEN_PATHS) else FAULT
        where = f"{error.filename}: " if error.filename else ""
        return code, f"{where}{error.strerror or text}"
    if isinstance(error, ImportError) and "pip install" in text:  # an extra of ours
        return MISTAKE, text
    if isinstance(error, ValueError | FloatingPointError):
        return MISTAKE, text + _raised_elsewhere(error)
    if type(error).__name__ == "DeviceMemoryError":  # ours, and says what to change
        return FAULT, text
    if type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError"):
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            return FAULT, _OUT_OF_MEMORY
        return FAULT, _first_line(text)
    return None


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _first_line(text: str) -> str:
    return (text or "no message").splitlines()[0]


def _raised_elsewhere(error: BaseException) -> str:
    """Where a library raised it, whose words alone may not tell what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or f"{os.sep}jaxtrain{os.sep}" in frames[-1].filename:
        return ""
    file, line = frames[-1].filename, frames[-1].lineno
    return f"\n(from {file}, line {line}; --debug shows the way there)"
