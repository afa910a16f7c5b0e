"""What can be known to fail before a model loads: folders, logins, earlier steps.

Nothing here imports jax, so that a command can look before it waits for that.
"""

import functools
import importlib.util
import json
import netrc
import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxtrain.config import RunConfig, diff, resolve
from jaxtrain.config.renamed import as_recorded, is_recorded
from jaxtrain.run import hub
from jaxtrain.run.ledger import find_loss
from jaxtrain.run.saved_record import is_committed, read_record
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.checks import check_writable, find_obstacle

# A change of these always makes other leaves of the train state, or another order of
# rows. What only may do so is found when the checkpoint is read.
_DECIDING = (
    "training.training_type",
    "training.optimizer",
    "training.moment_dtype",
    "training.fp16",
    "training.lora.enabled",
    "training.lora.use_dora",
    "training.gradient_accumulation_steps",
    "training.seed",
    "data.shuffle",
    "data.packing",
    "data.share_prompts",
    "model.param_dtype",
    "model.architecture.hidden_size",
    "model.architecture.intermediate_size",
    "model.architecture.num_hidden_layers",
    "model.architecture.num_attention_heads",
    "model.architecture.num_key_value_heads",
)
# Of new adapters: their shapes, and how much of them is added.
_OF_ADAPTERS = {
    f"training.lora.{key}"
    for key in (
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "init_lora_weights",
    )
}  # fmt: skip
# What else makes other leaves, or does not: that is seen in the checkpoint alone.
_OF_LEAVES = (
    "model.name_or_path:", "model.revision:", "model.tokenizer_name_or_path:",
    "model.architecture.", "training.lora.",
)  # fmt: skip
# Defaults that changed, or may: how examples go into rows, what of experts is adapted.
_KEPT = {
    "data": ("packing", "share_prompts"),
    "training.lora": ("target_parameters", "quantize_experts"),
}
_SET_BACK = "Set them back, or use a new workdir"
_PATTERN = "*?[]\\"  # Orbax looks for the files of a checkpoint with glob
_MODES_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def check(
    run: RunConfig, workdir: Any, environ: Mapping[str, str] = os.environ
) -> None:
    """Refuse a run that would fail later, for reasons that are no model's.

    Raises:
        ValueError: the work directory, what is saved in it, or a missing login.
    """
    check_workdir(workdir)
    if owner_of(workdir) == "model":
        raise ValueError(
            f"workdir = {os.fspath(workdir)!r} is the folder of a model or an adapter,"
            " whose config.json the run would write over; give another workdir"
        )
    _check_earlier_steps(run, workdir / "checkpoints")
    if "wandb" in run.loop.report_to:
        _check_wandb(environ)
    if run.loop.push_to_hub:
        hub.check(run.loop.push_to_hub, environ)


def check_workdir(workdir: str | os.PathLike[str]) -> None:
    """Refuse a work directory that cannot be made or written to.

    Raises:
        ValueError: it, or a folder above it, is a file or cannot be written to, or
            its name is a pattern; of an address, as of `storage.checks`.
    """
    named = f"workdir = {os.fspath(workdir)!r}"
    _check_address(os.fspath(workdir))
    if is_remote(workdir):
        return
    absolute = pathlib.Path(workdir).absolute()
    if marks := sorted(set(str(absolute)) & set(_PATTERN)):
        raise ValueError(
            f"{named}: {absolute} has {' '.join(marks)} in it, which the library that"
            " writes checkpoints reads as a pattern, so none could be restored; give a"
            f" workdir without any of {' '.join(_PATTERN)}"
        )
    if obstacle := find_obstacle(absolute):
        at, why = obstacle
        raise ValueError(f"{named}: {at} {why}; give another workdir")


@functools.cache
def _check_address(workdir: str) -> None:
    """Refuse an address that cannot be written to; once, for that takes a moment."""
    check_writable(workdir, "workdir")
    bucket_marks = set(workdir) & set(_PATTERN) if is_remote(workdir) else set()
    if bucket_marks:
        raise ValueError(
            f"workdir = {workdir!r} has {' '.join(sorted(bucket_marks))} in it, which"
            " reads as a pattern of names; give a workdir without any of"
            f" {' '.join(_PATTERN)}"
        )


def owner_of(folder: Any) -> Literal["run", "model"] | None:
    """Whose a folder's config.json is; an adapter counts as a model. None: nobody's."""
    if (folder / "adapter_config.json").is_file():
        return "model"
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return "run" if is_recorded(content) else "model"


def saved_steps(directory: Any) -> list[int]:
    """The steps saved in a directory of checkpoints, ascending, read off its names.

    In a bucket those that are committed.
    """
    steps = (path for path in directory.glob("*") if path.name.isdecimal())
    return sorted(int(path.name) for path in steps if is_committed(path))


def refuse_never(directory: Any, step: int) -> ValueError:
    """The error of `resume_from_checkpoint = never` beside a checkpoint."""
    return ValueError(
        f"training.resume_from_checkpoint = 'never', but {directory} holds step"
        f" {step}: use a new workdir, or 'auto' to continue"
    )


def _check_earlier_steps(run: RunConfig, directory: Any) -> None:
    """Refuse settings under which the newest step could not be gone on from."""
    steps = saved_steps(directory)
    if not steps:
        _refuse_lost(run, directory.parent)
        return
    if run.loop.resume_from_checkpoint == "never":
        raise refuse_never(directory, steps[-1])
    saved = _saved_config(directory / str(steps[-1]))
    deciding = set(_DECIDING)
    if run.lora is not None and not run.lora.init_from:
        deciding |= _OF_ADAPTERS
    keys = tuple(f"{key}{mark}" for key in deciding for mark in ":.")
    changed = [line for line in diff(saved, run) if line.startswith(keys)]
    if saved and (
        changed := [
            *filter(_was_known, changed),
            *_batch_change(saved, run),
            *_start_change(saved, run),
            *_average_change(saved, run),
        ]
    ):
        raise _refuse_other(directory, steps[-1], changed)


def explain_mismatch(
    run: RunConfig, directory: Any, step: int, advice: str = _SET_BACK
) -> ValueError | None:
    """The error of a checkpoint with other leaves; None if no setting tells why."""
    saved = _saved_config(directory / str(step))
    changed = [line for line in diff(saved, run) if line.startswith(_OF_LEAVES)]
    other = _refuse_other(directory, step, changed, advice)
    return other if saved and changed else None


def _refuse_other(
    directory: Any, step: int, changed: Sequence[str], advice: str = _SET_BACK
) -> ValueError:
    return ValueError(
        f"{directory} holds step {step} of a run with other settings, which does not"
        f" fit: {'; '.join(changed)}. {advice}"
    )


def _refuse_lost(run: RunConfig, workdir: Any) -> None:
    """Refuse to begin at step 0 where checkpoints were, unless the run asks for it.

    Raises:
        ValueError: says what shows that, and how to begin anew.
    """
    if run.loop.resume_from_checkpoint == "never":
        return
    loss = find_loss(workdir)
    if loss is not None:
        raise ValueError(
            f"nothing to resume from: {loss}. Put the checkpoints back; or begin anew"
            " in another workdir, or here with training.resume_from_checkpoint ="
            " 'never', which writes over the records"
        )


def keep_recorded(config: ConfigDict, workdir: Any) -> bool:
    """Set on `config` what an earlier start of this run did by default (`_KEPT`).

    Only what is unset: defaults may have changed since. Returns whether it set any.
    """
    folder = workdir / "checkpoints"
    found = (_saved_config(folder / str(n)) for n in reversed(saved_steps(folder)))
    saved = as_recorded(next(filter(None, found), {}))
    kept = False
    for section, keys in _KEPT.items():
        before, given = _section(saved, section), _section(config, section)
        unset = {
            key: before[key]
            for key in keys
            if before.get(key) is not None and given.get(key) is None
        }
        if unset:
            *above, last = section.split(".")
            with config.unlocked():
                parent = functools.reduce(lambda tree, name: tree[name], above, config)
                if not isinstance(parent.get(last), ConfigDict):
                    parent[last] = ConfigDict()
                for key, value in unset.items():
                    parent[last][key] = value
            kept = True
    return kept


def as_begun(
    run: RunConfig, config: ConfigDict, workdir: Any, device_count: int | None = None
) -> RunConfig:
    """`run`, which `config` resolves to, with what `keep_recorded` sets."""
    kept = keep_recorded(config, workdir)
    return resolve(config, device_count=device_count) if kept else run


def _section(config: Any, name: str) -> Mapping[str, Any]:
    """The keys of a section; none where a configuration has not got it."""
    for part in name.split("."):
        config = config.get(part) or {}
    return dict(config)


def _saved_config(step: Any) -> dict[str, Any]:
    """The configuration in a checkpoint's record; empty where it cannot be read."""
    try:
        return dict(read_record(step)["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # restoring it says what is wrong


def _was_known(change: str) -> bool:
    """Not a key that an earlier version had not, nor one of a section that was off.

    Names in a pattern are the user's: that one was not there is known of every version.
    """
    own = ("training.lora.enabled", *(f"{key}." for key in _OF_ADAPTERS))
    return ": None -> " not in change or change.startswith(own)


def _batch_change(saved: Mapping[str, Any], run: RunConfig) -> list[str]:
    """The rows of a micro-batch on all devices, where they are others now."""
    name = "per_device_train_batch_size"
    try:
        mesh, each = saved["mesh"], saved["training"][name]
        then = each * mesh["data"] * mesh["fsdp"] * mesh.get("expert", 1)
    except (KeyError, TypeError):
        return []
    now = run.loop.per_device_train_batch_size * run.mesh.row_shards
    if then == now or min(then, now) < 0:
        return []
    return [f"training.{name} times data-parallel devices: {then} -> {now}"]


def _start_change(saved: Mapping[str, Any], run: RunConfig) -> list[str]:
    """Whether adapters began elsewhere: they are a part of the model, or its scale.

    The folder of the same ones may have moved since.
    """
    before = _section(saved, "training.lora")
    if run.lora is None or not before:
        return []
    then, now = before.get("init_from") or None, run.lora.init_from or None
    moved = then and now and not os.path.isdir(then)
    if then == now or moved:
        return []
    return [f"training.lora.init_from: {then!r} -> {now!r}"]


def _average_change(saved: Mapping[str, Any], run: RunConfig) -> list[str]:
    """Whether there is an average of the weights, where there was none or is none."""
    name, now = "ema_decay", run.optimizer.ema_decay
    before = saved.get("training") or {}
    if name not in before or (before[name] is None) == (now is None):
        return []
    return [f"training.{name}: {before[name]} -> {now}"]


def _check_wandb(environ: Mapping[str, str]) -> None:
    """Refuse wandb where it would ask for a login.

    Raises:
        ValueError: names the ways to log in.
    """
    if importlib.util.find_spec("wandb") is None:
        return  # what imports it says how to get it
    offline = environ.get("WANDB_MODE", "").lower() in _MODES_WITHOUT_LOGIN
    named = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if offline or any(environ.get(name) for name in named):
        return
    address = environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urllib.parse.urlsplit(address).hostname or address
    if not _is_in_netrc(host, environ.get("NETRC")):
        raise ValueError(
            f"training.report_to has 'wandb', but you are not logged in to {host}: run"
            " `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to keep the"
            " record here"
        )


def _is_in_netrc(host: str, path: str | None) -> bool:
    places = [path] if path else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            if netrc.netrc(os.path.expanduser(place)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
