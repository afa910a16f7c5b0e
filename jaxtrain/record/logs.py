"""What a command prints: our log lines, and nothing that libraries say beside them.

A command calls `set_up` before it imports jax or any other large library, for some of
them read how much they may say as they are imported.
"""

import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Mapping, MutableMapping
from typing import TextIO

from tqdm import tqdm

from jaxtrain.record.safe_text import escape_controls, mask_text

COLUMNS = 100  # of the longest line, where no word is longer
_LEVELS = ("debug", "info", "warning", "error")
_LEVEL_KEY = "JAXTRAIN_LOG_LEVEL"
_INDENT = " " * len("00:00:00 ")
# Below an error, what these log is of no use to someone who trains a model.
_LIBRARIES = (
    *("absl", "datasets", "etils", "filelock", "flax", "fsspec", "grain"),
    *("httpcore", "httpx", "huggingface_hub", "jax", "jaxlib", "ml_collections"),
    *("optax", "orbax", "tensorboardX", "tensorstore", "tokenizers", "torch"),
    *("transformers", "urllib3"),
)
# They log a traceback of what they raise too, or of a device that is not there; our
# message follows.
_NOISY = (
    *("jax._src.xla_bridge", "gcsfs", "google.auth", "s3fs", "botocore"),
    "asyncio",  # what Orbax dropped of a damaged checkpoint
)
# How much libraries say for which Python's logging and warnings are not asked.
_QUIET: Mapping[str, str] = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's own lines: errors only
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # "None of PyTorch, TensorFlow..."
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
}


def set_up(
    *, debug: bool = False, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Print our own warnings on stderr, and errors alone of the libraries.

    stdout is left to a command's result; a training, whose lines are its result, calls
    `show_progress` too. What the environment says about a library stays as it is.

    Args:
        debug: print every line of everyone, as JAXTRAIN_LOG_LEVEL=debug does.

    Raises:
        ValueError: JAXTRAIN_LOG_LEVEL is no level.
    """
    level = "debug" if debug else environ.get(_LEVEL_KEY, "").lower() or "warning"
    if level not in _LEVELS:
        raise ValueError(
            f"{_LEVEL_KEY} = {environ[_LEVEL_KEY]!r}: no level; set one of"
            f" {', '.join(_LEVELS)}, or unset it"
        )
    shows_all = level == "debug"
    handler = LineHandler()
    handler.setFormatter(LineFormatter(with_all_tracebacks=shows_all))
    root = logging.getLogger()
    root.handlers[:] = [handler]  # absl has put its own handler there
    root.setLevel(logging.INFO if shows_all else logging.WARNING)
    logging.getLogger("jaxtrain").setLevel(level.upper())
    logging.captureWarnings(True)
    if shows_all:
        return
    handler.addFilter(_is_not_chatter)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name, value in _QUIET.items():
        environ.setdefault(name, value)
    if not sys.stderr.isatty():  # a download's bar is of use where one looks on
        environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:  # else `python -W` or PYTHONWARNINGS has decided
        _silence_warnings_of_libraries()


def show_progress(environ: Mapping[str, str] = os.environ) -> None:
    """Print our own lines from INFO up, on stdout, if `set_up` was called."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LineHandler):
            handler.on_stdout = True
            ours = logging.getLogger("jaxtrain")
            if not environ.get(_LEVEL_KEY):
                ours.setLevel(min(ours.level, logging.INFO))


class LineHandler(logging.Handler):
    """Prints records above the progress bar where one is drawn."""

    on_stdout = False  # but on stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            print_line(
                self.format(record), sys.stdout if self.on_stdout else sys.stderr
            )
        except Exception:
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """`12:30:59 text`; further lines stand below the text, and long lines are wrapped.

    A word of its own, such as a path, is never cut, and errors are never wrapped.
    Secrets are masked, and control characters are spelled.
    """

    def __init__(self, *, with_all_tracebacks: bool = True) -> None:
        """Make a formatter.

        Args:
            with_all_tracebacks: print libraries' tracebacks too, and not only our own.
                A command leaves them out, because it reports the error in one line.
        """
        super().__init__(datefmt="%H:%M:%S")
        self._with_all = with_all_tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """The lines of one record."""
        text = record.getMessage()
        if record.levelno != logging.INFO:
            text = f"{record.levelname.lower()}: {text}"
        if record.exc_info and (self._with_all or not _is_of_library(record)):
            text = f"{text}\n{self.formatException(record.exc_info)}"
        lines = escape_controls(mask_text(text)).splitlines()
        if record.levelno < logging.ERROR:
            lines = [part for line in lines for part in _wrap(line)]
        text = f"\n{_INDENT}".join(lines)
        return f"{self.formatTime(record, self.datefmt)} {text}"


def print_line(line: str, file: TextIO | None = None) -> None:
    """Print on stdout at once, above the progress bar where one is drawn.

    Where nobody reads any more, as behind `| head -1`, a run goes on unseen; what the
    terminal's encoding has no sign for is a question mark.
    """
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    line = line.encode(encoding, "replace").decode(encoding)
    try:
        tqdm.write(line, file=file)
        file.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _wrap(line: str) -> list[str]:
    if len(line) <= COLUMNS - len(_INDENT):
        return [line]
    return textwrap.wrap(
        line,
        COLUMNS - len(_INDENT),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _is_not_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not _is_of_library(record)


def _is_of_library(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _LIBRARIES


def _silence_warnings_of_libraries() -> None:
    """Warnings about code are for those who wrote it; those of a user's code stay."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    modules = "|".join((*_LIBRARIES, "google", "numpy", "pydantic", "pyarrow"))
    warnings.filterwarnings("ignore", module=rf"({modules})(\.|$)")
    # jax names the caller's line for this one, and says it where nothing is wrong.
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
