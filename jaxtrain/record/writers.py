"""Writers: where a run's numbers, sample texts and config go.

JSON lines (always), TensorBoard, Weights & Biases, and the console. Only process 0
writes. A resumed run first takes back what was recorded after its checkpoint, so a
step stands in each curve once.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

from jaxtrain.config.own_parts import bind_own, load_own
from jaxtrain.record.console import ConsoleWriter
from jaxtrain.record.safe_text import mask_secrets
from jaxtrain.run.durable import flush, naming, write_whole
from jaxtrain.tree import dotted

_HPARAM_METRICS = ("loss", "eval_loss")  # that TensorBoard compares runs by
_KEY = "training.report_to"
_NO_WANDB = (
    "report_to has 'wandb', which is not installed: pip install 'jaxtrain[wandb]', or "
    "take it out of report_to"
)


class Writer(Protocol):
    """One destination. `step` never decreases.

    A class of the user's own is made with (folder, run_name, resume_step): the work
    directory, `training.run_name`, and the checkpoint's step from which the run goes
    on, None for a run that begins. What was recorded after that step is not valid.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers at `step`."""

    def write_text(self, step: int, texts: Mapping[str, str]) -> None:
        """Record texts at `step`, such as sample outputs."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Record the run's config, secrets masked."""

    def close(self) -> None:
        """Flush and release."""


def _is_own(name: str) -> bool:
    return ":" in name


class Writers(contextlib.AbstractContextManager["Writers"]):
    """Several writers as one; none is a writer that drops everything."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers (floats or scalar arrays) at `step`."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for writer in self.writers:
            writer.write(step, numbers)

    def write_text(self, step: int, texts: Mapping[str, str]) -> None:
        for writer in self.writers:
            writer.write_text(step, texts)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Record the config, its secrets masked."""
        masked = mask_secrets(config)
        for writer in self.writers:
            writer.write_config(masked)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def make_writers(
    report_to: Sequence[str] | str,
    workdir: str | os.PathLike[str],
    run_name: str | None,
    config_dict: Mapping[str, Any],
    resume_step: int | None = None,
    *,
    process_index: int = 0,
    total_steps: int | None = None,
) -> Writers:
    """JSON lines and the console, with what `report_to` names; the config is written.

    Args:
        report_to: of `tensorboard`, `wandb`, `jsonl` (which is always on), `none`, or
            a class of the user's own as `module:Class`.
        workdir: holds metrics.jsonl, samples.jsonl, config.json, tensorboard/, wandb/.
        run_name: the run's name in wandb; wandb makes one up for None.
        config_dict: the run's config, JSON values.
        resume_step: the checkpoint's step from which the run goes on; what was
            recorded after it is dropped. None starts anew and drops all.
        process_index: only process 0 gets writers.
        total_steps: length of the progress bar.

    Raises:
        ValueError: an unknown name in `report_to`.
        ImportError: wandb is not installed; names the pip extra.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    known = ("tensorboard", "wandb", "jsonl", "none")
    for name in names:
        if name not in known and not _is_own(name):
            raise ValueError(f"report_to has {name!r}: choose from {', '.join(known)}")
    if process_index != 0:
        return Writers([])
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    writers: list[Writer] = [JsonlWriter(folder, resume_step)]
    if "tensorboard" in names:
        writers.append(TensorBoardWriter(folder / "tensorboard", resume_step))
    if "wandb" in names:
        writers.append(WandbWriter(folder, run_name, resume_step))
    for name in filter(_is_own, names):
        writers.append(load_own(_KEY, name)(folder, run_name, resume_step))
    writers.append(ConsoleWriter(total_steps, resume_step))
    combined = Writers(writers)
    combined.write_config(config_dict)
    return combined


def check_installed(report_to: Sequence[str]) -> None:
    """Refuse a tracker that is not installed or importable, before any long work.

    Raises:
        ValueError: names the pip extra, or says what is wrong with a class.
    """
    for name in filter(_is_own, report_to):
        bind_own(_KEY, name, None, "folder", "run_name", "resume_step")
        methods = ("write", "write_text", "write_config", "close")
        if missing := [m for m in methods if not hasattr(load_own(_KEY, name), m)]:
            raise ValueError(f"{_KEY} = {name!r}: it has no {', '.join(missing)}")
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"training.{_NO_WANDB}")


# ----------------------------------------------------------------------- JSON lines


class JsonlWriter:
    """metrics.jsonl and samples.jsonl: one JSON object a line, with step and time.

    `time` is seconds since 1970. A number that JSON cannot hold (NaN, infinity) is
    written as null. Lines are flushed at once. The files stay open, because a mounted
    bucket uploads the whole file each time that it is closed.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        resume_step: int | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._files: dict[str, TextIO] = {}
        for name in ("metrics.jsonl", "samples.jsonl"):
            drop_lines_after(folder / name, resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append("metrics.jsonl", step, finite)

    def write_text(self, step: int, texts: Mapping[str, str]) -> None:
        self._append("samples.jsonl", step, texts)

    def write_config(self, config: Mapping[str, Any]) -> None:
        text = json.dumps(config, indent=2, default=str)
        write_whole(self._folder / "config.json", f"{text}\n")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": step, "time": self._clock(), **values}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        if name not in self._files:
            # Half of a surrogate pair, which UTF-8 lacks, becomes JSON's own escape.
            self._files[name] = (self._folder / name).open(
                "a", encoding="utf-8", errors="backslashreplace"
            )
        with naming(self._folder / name):
            self._files[name].write(f"{line}\n")
            self._files[name].flush()


def drop_lines_after(path: pathlib.Path, step: int | None) -> None:
    """Keep the lines up to `step` (None: no line) of a file of JSON lines.

    What a killed process or a damaged disk left goes too: half a line, bytes that are
    no UTF-8, and a second record of the same step and kind. The file is replaced at
    once, so a kill in between loses nothing.
    """
    if not path.exists():
        return
    kept: dict[tuple[float, bool], bytes] = {}
    # Of bytes, for in a text U+2028 ends a line too.
    for line in path.read_bytes().splitlines(keepends=True):
        found = _read_line(line)
        if found is None or step is None or found[0] > step:
            continue
        kept[found] = line
    scratch = path.with_name(f"{path.name}.tmp")
    with naming(scratch):
        scratch.write_bytes(b"".join(kept.values()))
        flush(scratch)
    os.replace(scratch, path)


def _read_line(line: bytes) -> tuple[float, bool] | None:
    """The step of a whole line, and whether it is of an evaluation."""
    try:
        record = json.loads(line.decode("utf-8"))
        step = record["step"]
    except (ValueError, KeyError, TypeError):
        return None
    is_whole = line.endswith(b"\n") and isinstance(step, int | float)
    is_evaluation = any(name.startswith("eval_") for name in record)
    return (step, is_evaluation) if is_whole else None


# ----------------------------------------------------------------- TensorBoard, wandb


class TensorBoardWriter:
    """TensorBoard event files, through tensorboardX."""

    def __init__(self, folder: pathlib.Path, resume_step: int | None = None) -> None:
        self._writer = _import_tensorboardx().SummaryWriter(
            str(folder),
            # TensorBoard hides what earlier files hold from this step on.
            purge_step=0 if resume_step is None else resume_step + 1,
            # The name holds whole seconds: a quick restart would overwrite the file.
            filename_suffix=f".{time.time_ns()}",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_text(self, step: int, texts: Mapping[str, str]) -> None:
        """Record texts, shown as they are and not as Markdown."""
        for name, text in texts.items():
            indented = "\n".join(
                f"    {line}" for line in _printable(text).splitlines()
            )
            self._writer.add_text(name, indented, step)
        self._writer.flush()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Record the config as a text, and its keys as hyperparameters.

        TensorBoard's page HPARAMS then compares runs by them and by their losses.
        """
        self.write_text(0, {"config": json.dumps(config, indent=2, default=str)})
        metrics = dict.fromkeys(_HPARAM_METRICS)
        summary = importlib.import_module("tensorboardX.summary")
        for part in summary.hparams(_as_hparams(config), metrics)[:2]:  # not the end
            self._writer.file_writer.add_summary(part)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _as_hparams(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of the run's sections that is a number, a text, or true or false."""
    plain = {k: v for k, v in config.items() if k in ("training", "model", "data")}
    return {
        key: value
        for key, value in dotted(plain).items()
        if isinstance(value, bool | int | float | str)
    }


def _import_tensorboardx() -> Any:
    """tensorboardX, without PyTorch.

    Where PyTorch is installed, tensorboardX imports it for the sake of its graphs: a
    third of the time that a run takes to start. While it is imported here, PyTorch
    counts as not installed, unless this process has imported it already.
    """
    if "torch" in sys.modules or "tensorboardX" in sys.modules:
        return importlib.import_module("tensorboardX")
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


class WandbWriter:
    """Weights & Biases. WANDB_PROJECT, WANDB_MODE and its other variables hold.

    The run's id is kept in the workdir, so a resumed run goes on in the same curves;
    wandb itself ignores steps that it has already.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        run_name: str | None = None,
        resume_step: int | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(_NO_WANDB) from error
        self._wandb = wandb
        id_file = folder / "wandb_run_id.txt"
        if resume_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxtrain"),
            name=run_name,
            dir=str(folder),
            id=id_file.read_text().strip(),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def write_text(self, step: int, texts: Mapping[str, str]) -> None:
        """Record texts as a table."""
        table = self._wandb.Table(columns=["step", "name", "text"])
        for name, text in texts.items():
            table.add_data(step, name, _printable(text))
        self._run.log({"samples": table}, step=step)

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()


def _printable(text: str) -> str:
    """A text that UTF-8 can hold: without halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
