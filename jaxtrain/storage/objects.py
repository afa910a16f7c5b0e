"""Single objects, read, written and deleted under conditions.

A version is what a bucket gives each write of an object: on gs:// its generation, on
s3:// its tag, which depends on the content alone.
"""

import contextlib
import dataclasses
from datetime import datetime
from typing import Any

from fsspec.asyn import sync

from jaxtrain.storage.address import AnyPath, filesystem, scheme_of, split
from jaxtrain.storage.errors import chain

_MOST_READS = 5


@dataclasses.dataclass(frozen=True)
class Found:
    """An object as it was read. `changed`: when, in seconds since 1970 by its clock."""

    content: bytes
    version: str
    changed: float


def read(address: AnyPath) -> Found | None:
    """An object with the version of this very content; None if there is none.

    Raises:
        OSError: it changes all the time.
    """
    for _ in range(_MOST_READS):
        before = _look(address)
        if before is None:
            return None
        with contextlib.suppress(FileNotFoundError):  # replaced in between
            content = filesystem(address).cat_file("/".join(split(address)))
            if _look(address) == before:
                return Found(content, *before)
    raise OSError(f"{address} changes faster than it can be read")


def read_range(address: AnyPath, start: int, stop: int, version: str) -> bytes | None:
    """Bytes of a version of an object, at least one; None if it has changed or is gone.

    On s3:// `version` is the tag without its quotes.
    """
    files, (bucket, key) = filesystem(address), split(address)
    wanted = f"bytes={start}-{stop - 1}"
    content = b""
    with _conditional() as done:
        if scheme_of(address) == "s3":
            given = {"Bucket": bucket, "Key": key, "Range": wanted}
            body = files.call_s3("get_object", IfMatch=f'"{version}"', **given)["Body"]
            with contextlib.closing(body):
                content = sync(files.loop, body.read)
        else:
            _, content = files.call(
                "GET",
                files.url(f"{bucket}/{key}"),
                ifGenerationMatch=version,
                headers={"Range": wanted},
            )
    return content if done else None


def create(address: AnyPath, content: bytes) -> bool:
    """Write an object; False, with nothing written, if there is one."""
    files = filesystem(address)
    with _conditional() as done:
        files.pipe_file("/".join(split(address)), content, mode="create")
    return bool(done)


def replace(address: AnyPath, content: bytes, version: str) -> bool:
    """Write an object over its version; False if it has changed or is gone."""
    files, (bucket, key) = filesystem(address), split(address)
    with _conditional() as done:
        if scheme_of(address) == "s3":
            given = {"Bucket": bucket, "Key": key, "Body": content}
            files.call_s3("put_object", IfMatch=version, **given)
        else:
            files.call(
                "POST",
                f"{files.base.removesuffix('storage/v1/')}upload/storage/v1/b/"
                f"{bucket}/o",
                uploadType="media",
                name=key,
                ifGenerationMatch=version,
                data=content,
                headers={"Content-Type": "application/octet-stream"},
            )
    return bool(done)


def delete(address: AnyPath, version: str) -> bool:
    """Delete a version of an object; False if it has changed or is gone."""
    files, (bucket, key) = filesystem(address), split(address)
    with _conditional() as done:
        if scheme_of(address) == "s3":
            files.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=version)
        else:
            files.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=version)
    return bool(done)


def _look(address: AnyPath) -> tuple[str, float] | None:
    """Version and time of change of an object; None if there is none."""
    files, (bucket, key) = filesystem(address), split(address)
    try:
        if scheme_of(address) == "s3":
            found = files.call_s3("head_object", Bucket=bucket, Key=key)
            return str(found["ETag"]), found["LastModified"].timestamp()
        found = files.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
        changed = datetime.fromisoformat(found["updated"].replace("Z", "+00:00"))
        return str(found["generation"]), changed.timestamp()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _conditional() -> Any:
    """A list that holds something once the body has done its work."""
    done: list[bool] = []
    try:
        yield done
        done.append(True)
    except Exception as error:
        if not any(_says_condition(each) for each in chain(error)):
            raise


def _says_condition(error: BaseException) -> bool:
    """Whether a condition did not hold, for there is another object, or none."""
    if isinstance(error, FileExistsError | FileNotFoundError):
        return True
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    # Two conditional writes at one moment: S3 lets one of them fail by a conflict.
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict")
