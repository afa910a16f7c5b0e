"""The console: a line for each record, and a progress bar on a terminal."""

import itertools
import math
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from jaxtrain.config.eval_sets import names_in, plain_name, prefix_of
from jaxtrain.record.logs import COLUMNS, print_line

_CUT = "…"
_MOST_EVAL_LINES = 2
_MOST_TEXTS = 6
_LONGEST_NAME = 40

# Shown first, in this order, under these names; anything else follows as it is named.
# What does not fit a line is left out from the end.
_NAMES = {
    "loss": "loss",
    "skipped_steps": "skipped_steps",
    "perplexity": "ppl",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "learning_rate": "lr",
    "tokens_per_sec": "tokens/s",
    "grad_norm": "grad_norm",
    "mfu": "mfu",
    "router_load": "router_load",
    "kl": "kl",
    "samples_per_sec": "samples/s",
    "epoch": "epoch",
    "goodput_share": "goodput",
    "device_memory_peak_gib": "peak_gib",
}
# In the files and trackers only.
_NOT_ON_CONSOLE = re.compile(
    r"(eval_)?(entropy|mean_token_accuracy|num_tokens|logits/.*|logps/.*"
    r"|rewards/(chosen|rejected)|nll/.*|grad_norm/.*|generated_words|data_wait_share"
    r"|useful_token_share|router_(entropy|z_loss|dropped)"
    r"|step_time_.*|host_memory_gib|device_memory_gib)"
)


class ConsoleWriter:
    """A line for each record, and a progress bar where a terminal shows both.

        step   5/80 | 12s, 3m00s left | loss 0.6931 | lr 1.00e-04 | tokens/s 81.2k
        eval  20/80 | 48s, 2m24s left | loss 0.6012 | accuracy 0.8125
        eval helpful  20/80 | 48s, 2m24s left | loss 0.6012 | accuracy 0.8125

    The times are those since the writer was made, and those that the remaining steps
    take at the pace since the first record, evaluation and saving included. Before that
    is known from as many steps as preceded the first record, the time of a step stands
    in; without one, `<` marks an upper bound, for compilation is part of it.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        resume_step: int | None = None,
        *,
        stream: TextIO | None = None,
        show_bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Lines go to `stream` (stdout), the bar to stderr; both must be terminals."""
        self._stream = stream or sys.stdout
        self._total = total_steps
        self._first_step = self._last_step = resume_step or 0
        self._clock, self._started = clock, clock()
        self._paced: tuple[int, float] | None = None  # step and time of a first record
        self._step_secs: float | None = None  # of the last record that tells
        if show_bar is None:
            show_bar = self._stream.isatty() and sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=self._last_step,
            unit="step",
            dynamic_ncols=True,
            disable=not show_bar,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Advance the bar and print a line; of an evaluation at most two for a set."""
        self._bar.update(max(step - self._last_step, 0))
        self._last_step = max(step, self._last_step)
        if "loss" in metrics:
            self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}", refresh=False)
        width = len(str(self._total or 0))
        place = f"{step:>{width}}" + ("" if self._total is None else f"/{self._total}")
        times = self._times(step, metrics)
        if not _are_of_an_evaluation(metrics):
            self._write_lines(f"step {place} | {times}", metrics, 1)
            return
        for name in names_in(metrics):
            own = {
                f"eval_{plain_name(metric, [name])}": value
                for metric, value in metrics.items()
                if metric.startswith(prefix_of(name))
            }
            label = f"eval {one_line(name, _LONGEST_NAME)}".rstrip()
            self._write_lines(f"{label} {place} | {times}", own, _MOST_EVAL_LINES)

    def _write_lines(
        self, head: str, metrics: Mapping[str, float], most_lines: int
    ) -> None:
        """Print the metrics behind `head`, and what is left of them below it."""
        lines = format_metrics(
            {n: v for n, v in metrics.items() if not _NOT_ON_CONSOLE.fullmatch(n)},
            COLUMNS - len(head) - len(" | "),
            most_lines=most_lines,
        )
        first, *rest = lines or [""]
        self._print(f"{head} | {first}" if first else head)
        for line in rest:
            self._print(f"{' ' * len(head)} | {line}")

    def write_text(self, step: int, texts: Mapping[str, str]) -> None:
        """Print the beginning of the first few texts, a line each."""
        for name, text in itertools.islice(texts.items(), _MOST_TEXTS):
            self._print(one_line(f"step {step} {name}: {text}", COLUMNS))
        if (left_out := len(texts) - _MOST_TEXTS) > 0:
            self._print(f"step {step} and {left_out} more texts in samples.jsonl")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Nothing: config.json is the place to read it."""

    def close(self) -> None:
        self._bar.close()

    def _times(self, step: int, metrics: Mapping[str, float]) -> str:
        """`12s, 3m00s left`."""
        now = self._clock()
        elapsed, done = now - self._started, step - self._first_step
        if self._paced is None and done > 0:
            self._paced = (step, now)
        if self._total is None:
            return duration(elapsed)
        self._step_secs = metrics.get("step_time_p50_secs", self._step_secs)
        bound, pace = "", self._step_secs
        before = 0 if self._paced is None else self._paced[0] - self._first_step
        if self._paced is not None and done >= max(2 * before, before + 1):
            pace = (now - self._paced[1]) / (done - before)
        elif pace is None and done > 0:
            bound, pace = "<", elapsed / done
        left = "?" if pace is None else duration(pace * max(self._total - step, 0))
        return f"{duration(elapsed)}, {bound}{left} left"

    def _print(self, line: str) -> None:
        print_line(line, self._stream)


def format_metrics(
    metrics: Mapping[str, float], columns: int = COLUMNS, *, most_lines: int = 1
) -> list[str]:
    """Lines like `loss 2.303 | lr 1.00e-04 | tokens/s 81.2k`, the usual names first.

    The names of an evaluation's metrics lose their `eval_`. Metrics that do not fit are
    left out, the last first, and `…` says so.
    """
    prefix = "eval_" if _are_of_an_evaluation(metrics) else ""
    plain = {name.removeprefix(prefix): value for name, value in metrics.items()}
    names = [name for name in dict.fromkeys([*_NAMES, *plain]) if name in plain]
    cells = [
        f"{one_line(_NAMES.get(n, n), _LONGEST_NAME)} {_format(n, plain[n])}"
        for n in names
    ]
    lines: list[str] = []
    line = ""
    for number, cell in enumerate(cells):
        longer = f"{line} | {cell}" if line else cell
        is_last_line = len(lines) + 1 == most_lines
        is_last_cell = number + 1 == len(cells)
        # The last line keeps room for the sign that something is left out.
        room = columns - (3 + len(_CUT) if is_last_line and not is_last_cell else 0)
        if len(longer) <= room:
            line = longer
        elif is_last_line:
            line = f"{line} | {_CUT}" if line else _CUT
            break
        else:
            lines.append(line)
            line = cell
    return [text for text in (*lines, line) if text]


def _are_of_an_evaluation(metrics: Mapping[str, float]) -> bool:
    return all(name.startswith("eval_") for name in metrics)


def _format(name: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if name.endswith("_per_sec"):
        for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= scale:
                return f"{value / scale:.1f}{unit}"
        return f"{value:.1f}"
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    if name != "learning_rate" and 1e-3 <= abs(value) < 1e5:
        digits = 4 if name.endswith(("loss", "perplexity")) else 3
        return f"{value:#.{digits}g}".rstrip(".")
    return re.sub(r"e([-+])0", r"e\1", f"{value:.2e}")


def duration(seconds: float) -> str:
    """`45s`, `2m13s`, `1h05m` or `3d04h`."""
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s"))
    for size, unit, below, below_unit in units:
        rounded = round(seconds / below) * below
        if rounded >= size:
            first, rest = divmod(rounded, size)
            return f"{first:.0f}{unit}{rest // below:02.0f}{below_unit}"
    raise ValueError(f"{seconds} seconds is not a duration")


def one_line(text: str, columns: int) -> str:
    """The beginning of a text, its line ends and control characters as `\\n` and such.

    A model may write anything, and nothing of it may steer the terminal.
    """
    shown, used = "", 0
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        is_wide = unicodedata.east_asian_width(character[0]) in "WF"
        used += 2 if is_wide else len(character)
        if used > columns:
            return _fit(shown, columns - 1) + _CUT
        shown += character
    return shown


def _fit(text: str, columns: int) -> str:
    """A text without the last characters that are too much."""
    while _columns(text) > columns:
        text = text[:-1]
    return text


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
