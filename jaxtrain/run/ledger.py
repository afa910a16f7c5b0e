"""Whether a work directory has lost its checkpoints.

Beside `checkpoints/` a small file says that a step was saved. A run whose checkpoints
are gone must not begin again at step 0 as if nothing had been: its records would be
written over. A command looks before it imports jax, so nothing here does.
"""

import json
import pathlib
from typing import Any

from jaxtrain.run.durable import flush, write_whole
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.errors import retrying

LEDGER = "newest_checkpoint.json"


def note_saved(ledger: Any, step: int) -> None:
    """Write that `step` is saved, unless the file says so already."""
    if read_saved(ledger) == step:
        return
    text = json.dumps({"step": step}) + "\n"
    if is_remote(ledger):
        retrying(lambda: ledger.write_text(text), f"writing {ledger}")
    else:
        write_whole(ledger, text)


def flush_records(ledger: Any) -> None:
    """Have the lines of a run's records on the disk before a checkpoint counts.

    To be called in the first process; it does so where there is a ledger beside them.
    Records of a bucket are uploaded instead (run/workdir.py).
    """
    if ledger is not None and not is_remote(ledger):
        for path in ledger.parent.glob("*.jsonl"):
            flush(path)


def read_saved(ledger: Any) -> int | None:
    """The newest step that was saved; 0 where the file is there and says nothing."""
    try:
        return int(json.loads(ledger.read_text("utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def find_loss(workdir: Any) -> str | None:
    """How a work directory without a checkpoint shows that it had some; None if not."""
    folder = workdir / "checkpoints"
    aside = sorted(path.name for path in folder.glob("damaged-*"))
    if aside:
        return f"{folder} holds only damaged checkpoints ({', '.join(aside)})"
    step = read_saved(workdir / LEDGER)
    if step is not None:
        named = f"step {step}" if step else "a step"
        return f"{named} was saved in {folder}, and no checkpoint is there now"
    # A run that saves nothing writes no ledger, and neither did versions before it,
    # which knew no bucket and made the folder before the first record.
    if is_remote(workdir):
        return None
    if not _has_trained(workdir / "metrics.jsonl"):
        return None
    if not folder.exists():
        return f"{workdir / 'metrics.jsonl'} tells of training, but {folder} is gone"
    exports = (workdir / name for name in ("model", "adapter"))
    if made := next((str(export) for export in exports if export.is_dir()), None):
        return f"{made} is of a run that ended and saved no checkpoint"
    return None


def _has_trained(records: pathlib.Path) -> bool:
    """Whether a line tells of a step; a torn last line does not count."""
    try:
        with records.open(encoding="utf-8", errors="replace") as file:
            return any(_step_of(line) > 0 for line in file)
    except OSError:
        return False


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
