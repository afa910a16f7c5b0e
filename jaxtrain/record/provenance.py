"""Provenance: by which code, on which devices and from which data a run was made.

config.json holds it beside the sections of the configuration, as `provenance.starts`:
one entry for each start of the run, the oldest first, so that a run that went on under
another version says from which step on.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import yaml
from jax.sharding import Mesh

from jaxtrain import __version__
from jaxtrain.record.safe_text import mask_secrets

KEY = "provenance"
_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
_LIBRARIES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"),
    *("datasets", "numpy"),
)
_GIT_SECS = 5.0  # a checkout on a slow disk is no reason to wait


def describe_start(
    step: int, mesh: Mesh, data: Mapping[str, Any], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What a run starts with, as JSON values, without secrets.

    Args:
        step: the optimizer step that it starts from.
        data: what is known of the rows to train on and to evaluate on.
        notes: what keys of the configuration became.
    """
    return {
        "step": step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.orig_argv),
        "versions": versions(),
        "commit": commit(_PACKAGE.parent),
        "devices": {
            "kind": mesh.devices.flat[0].device_kind,
            "count": mesh.size,
            "platform": mesh.devices.flat[0].platform,
            "processes": jax.process_count(),
            "host": platform.node(),
        },
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "data": mask_secrets(data),
        "notes": list(notes),
    }


def with_history(
    config: Mapping[str, Any], start: Mapping[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
    """A configuration with a start in it, behind those that it goes on from."""
    earlier = _earlier_starts(workdir / "config.json") if start["step"] else []
    return {**config, KEY: {"starts": [*earlier, start]}}


def versions() -> dict[str, str]:
    """The versions that make a run's numbers; torch's only where it was loaded."""
    found = {"python": platform.python_version(), "jaxtrain": __version__}
    for name in (*_LIBRARIES, *({"torch"} & sys.modules.keys())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name.removesuffix("-checkpoint")] = importlib.metadata.version(name)
    return found


def commit(checkout: pathlib.Path) -> dict[str, Any] | None:
    """The commit of a checkout, and whether its `jaxtrain` folder differs from it.

    None where it is no checkout, as where the package is installed, or where git does
    not answer.
    """
    if not (checkout / ".git").exists():
        return None
    try:
        name = _git(checkout, "rev-parse", "HEAD")
        changes = _git(checkout, "status", "--porcelain", "--", "jaxtrain")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"id": name.strip(), "dirty": bool(changes.strip())}


def command_line(arguments: Sequence[str]) -> str:
    """The command as a shell takes it, secrets masked, as is code behind `-c`."""
    masked: list[str] = []
    name = ""  # of the flag whose value the next argument may be
    for argument in arguments:
        if argument.startswith("-"):
            name, given, value = argument.partition("=")
            masked.append(name + given + _mask(value, name.lstrip("-")))
        elif name == "-c":
            masked.append("...")
            name = ""
        else:
            masked.append(_mask(argument, name.lstrip("-")))
            name = ""
    return shlex.join(masked)


def _mask(value: str, name: str) -> str:
    """An argument without its secrets, those in a mapping or a list too."""
    if not value.startswith(("{", "[", "(")):
        return str(mask_secrets(value, name))
    with contextlib.suppress(yaml.YAMLError):  # JSON is YAML
        if isinstance(found := yaml.safe_load(value), dict | list):
            return json.dumps(mask_secrets(found, name), default=str)
    return "..."  # in Python's syntax: who knows what it holds


def _earlier_starts(path: pathlib.Path) -> list[Any]:
    """Those that an earlier start of the same run has written; [] if there are none."""
    try:
        return list(json.loads(path.read_text("utf-8"))[KEY]["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # by an older version, or not written by us


def _git(checkout: pathlib.Path, *arguments: str) -> str:
    # A hook's GIT_DIR would name another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECS,
    ).stdout
