"""Uploading an exported model or adapter to the Hugging Face hub.

The token is the one that `hf auth login` keeps or that HF_TOKEN holds. It is never read
into a configuration, a log or an error message.
"""

import functools
import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_ADAPTER_CONFIG = "adapter_config.json"
# A folder of the hub's cache, which says what it is a copy of.
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")


def check(repository: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse an upload that could not succeed. It takes one request.

    Args:
        repository: on the hub, as owner/name.

    Raises:
        ValueError: the name, a switch that forbids the network, no token, or one that
            the hub does not accept.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"push_to_hub = {repository!r} is not the name of a repository: write it as"
            " owner/name"
        )
    for switch in _SWITCHES:
        if environ.get(switch, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise ValueError(
                f"push_to_hub = {repository!r}: {switch} = {environ[switch]} forbids"
                " the network; unset it, or leave push_to_hub out and upload the export"
                " later with jaxtrain push"
            )
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise ValueError(
            f"push_to_hub = {repository!r}: this machine has no token of the hub; log"
            " in with `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    _check_token(repository)


@functools.cache  # a run is checked before jax is imported and once more after
def _check_token(repository: str) -> None:
    import huggingface_hub

    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # of requests, of the connection or of the answer
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"push_to_hub = {repository!r}: the hub does not answer to the token of"
            f" this machine ({reason:.200}); check the network, or log in again with"
            " `hf auth login`"
        ) from error


def find_export(path: pathlib.Path) -> pathlib.Path:
    """The directory to upload.

    This is `path` itself if it holds a model or an adapter. If `path` is the work
    directory of a run, it is the adapter that the run exported, or else its model.

    Raises:
        ValueError: there is no exported model or adapter.
    """
    for directory in (path, path / "adapter", path / "model"):
        weights = [*directory.glob("*.safetensors")]
        named = (directory / "config.json", directory / _ADAPTER_CONFIG)
        if weights and any(config.is_file() for config in named):
            return directory
    raise ValueError(
        f"{path} holds no exported model or adapter (config.json or {_ADAPTER_CONFIG}"
        " with .safetensors beside it): name one, or the work directory of a run that"
        " is over"
    )


def push(
    directory: pathlib.Path, repository: str, *, private: bool = True, message: str = ""
) -> str:
    """Upload a directory in one commit; returns its address on the hub.

    A repository that does not exist is made. Files that it holds already and the
    directory does not have stay. The base of an adapter is published by its hub name,
    not by where it lies in this machine's cache.

    Args:
        private: whether a repository that is made here is private.
    """
    import huggingface_hub as hub

    api = hub.HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    operations = [
        hub.CommitOperationAdd(
            path_in_repo=path.relative_to(directory).as_posix(),
            path_or_fileobj=_published(path),
        )
        for path in files
    ]
    made = api.create_commit(
        repository, operations, commit_message=message or "Upload from jaxtrain"
    )
    address = str(made.repo_url)
    logger.info("uploaded %s to %s", directory, address)
    return address


def base_name(name: str) -> str | None:
    """The hub name of a base model; None where only this machine knows it.

    Args:
        name: a hub name, a local directory, or a folder of the hub's cache.
    """
    if found := _CACHED.search(f"{name}/"):
        return f"{found[1]}/{found[2]}"
    is_name = _REPOSITORY.fullmatch(name) and not pathlib.Path(name).exists()
    return name if is_name else None


def _published(path: pathlib.Path) -> Any:
    """The file, or what to upload in its place."""
    if path.name != _ADAPTER_CONFIG:
        return path
    config = json.loads(path.read_text("utf-8"))
    local = config.get("base_model_name_or_path") or ""
    config["base_model_name_or_path"] = base_name(local)
    if local and config["base_model_name_or_path"] is None:
        logger.warning(
            "the adapter's base is a directory of this machine: its path is left out of"
            " the uploaded %s; name the base in the model card",
            _ADAPTER_CONFIG,
        )
    return f"{json.dumps(config, indent=2)}\n".encode()
