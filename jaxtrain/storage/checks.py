"""Look before anything long whether an address can be read, or written to."""

import concurrent.futures
import os
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

from jaxtrain.storage import errors
from jaxtrain.storage.address import (
    AnyPath,
    filesystem,
    is_remote,
    require_library,
    scheme_of,
    split,
)

# Longer than what the libraries take for their own tries of a server that is busy.
TIMEOUT_SECS = 60.0
_LOGINS = {
    "gs": "run `gcloud auth application-default login`, or let"
    " GOOGLE_APPLICATION_CREDENTIALS name a file of credentials",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
PROBE = ".jaxtrain-probe"


def check_readable(address: AnyPath, key: str) -> None:
    """Refuse a remote address that cannot be read; a local one is not looked at.

    Args:
        key: the configuration's name of it, for the message.

    Raises:
        ValueError: one line: no library, no bucket, nothing there, forbidden, no
            credentials, no answer.
    """
    if _is_checked(address, key):
        _try(lambda: _read(address), address, key, "read")


def check_writable(address: AnyPath, key: str) -> None:
    """Refuse a remote address below which nothing can be written and deleted.

    Raises:
        ValueError: as of `check_readable`.
    """
    if _is_checked(address, key):
        _try(lambda: _write(address), address, key, "written to")


def find_obstacle(folder: pathlib.Path) -> tuple[pathlib.Path, str] | None:
    """Where, and why, no file can be made in a folder, by its absolute local path."""
    found = next(at for at in (folder, *folder.parents) if os.path.lexists(at))
    if not found.is_dir():
        return found, "is a file, not a folder"
    if not os.access(found, os.W_OK | os.X_OK):
        return found, "cannot be written to"
    return None


def _is_checked(address: AnyPath, key: str) -> bool:
    try:
        if not is_remote(address):
            return False
        split(address)
        require_library(address)
    except ValueError as error:
        raise ValueError(f"{key} = {error}") from None
    return True


def _read(address: AnyPath) -> None:
    files, (bucket, name) = filesystem(address), split(address)
    try:
        found = files.ls(f"{bucket}/{name}" if name else bucket)
    except FileNotFoundError:
        files.ls(bucket)  # says whether there is such a bucket
        raise _Missing from None
    if name and not found:
        raise _Missing


def _write(address: AnyPath) -> None:
    files, bucket = filesystem(address), split(address)
    name = f"{PROBE}-{uuid.uuid4().hex}"
    probe = "/".join(filter(None, (*bucket, name)))
    files.pipe_file(probe, b"")
    files.rm_file(probe)


class _Missing(FileNotFoundError):
    """The bucket is there, and in it nothing of this name."""


def _try(call: Callable[[], Any], address: AnyPath, key: str, verb: str) -> None:
    """Make a call in a thread of its own, as some calls of the libraries hang.

    Raises:
        ValueError: it failed, or there was no answer in time.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="storage-check")
    try:
        pool.submit(call).result(TIMEOUT_SECS)
    except concurrent.futures.TimeoutError as error:
        if errors.is_network(error.__cause__ or error) and str(error):
            raise _refusal(error, address, key, verb) from error
        raise ValueError(
            f"{key} = {os.fspath(address)!r}: no answer from the bucket within"
            f" {TIMEOUT_SECS:.0f} s; check its name and the network"
        ) from None
    except Exception as error:
        raise _refusal(error, address, key, verb) from error
    finally:
        pool.shutdown(wait=False)


def _refusal(error: Exception, address: AnyPath, key: str, verb: str) -> ValueError:
    bucket, scheme = split(address)[0], scheme_of(address)
    named = f"{key} = {os.fspath(address)!r}"
    if isinstance(error, _Missing):
        told = f"the bucket {bucket!r} has nothing of this name"
    elif errors.is_login(error):
        told = f"no valid credentials for {scheme}:// were found: {_LOGINS[scheme]}"
    elif errors.is_forbidden(error):
        told = (
            f"it may not be {verb} with these credentials"
            f" ({errors.one_line(error, 120)}); give their account that right"
        )
    elif isinstance(error, FileNotFoundError):
        told = f"there is no bucket {bucket!r}; create it, or mend its name"
    else:
        told = f"it cannot be {verb}: {errors.one_line(error)}"
    return ValueError(f"{named}: {told}")
