"""The one place that decides whether something is on a disk or in a bucket.

An address keeps its form as a string or as an `etils.epath.Path`. A `pathlib.Path` of
it would shorten `gs://bucket` to `gs:/bucket`, a folder on the disk.
"""

import functools
import importlib.util
import os
import pathlib
import re
from typing import Any

# Each kind of address, the library that reads and writes it, and the extra with it.
LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "gcs", "s3": "s3"}

AnyPath = str | os.PathLike[str]


def is_remote(address: AnyPath) -> bool:
    """Whether this is the address of something in a bucket (gs://, s3://).

    Raises:
        ValueError: it is an address of another kind, it holds credentials, or it was
            an address before it became a path.
    """
    text = os.fspath(address)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/(/?)", text)
    if found is None:
        return False
    scheme, slash = found.groups()
    if not slash:
        if scheme in LIBRARIES:
            raise ValueError(
                f"{text!r} has lost a slash: give the address, {scheme}://..., as a"
                " string and not as a pathlib.Path"
            )
        return False
    if scheme not in LIBRARIES:
        raise ValueError(
            f"{text!r}: addresses with {scheme}:// cannot be used; give"
            " gs://bucket/folder or s3://bucket/folder, or download it and give a path"
        )
    if {"@", ":"} & {*text.partition("://")[2].partition("/")[0]}:
        # Not shown: what stands there may be a secret.
        raise ValueError(
            f"an address {scheme}://... has '@' or ':' before its first slash, as"
            " credentials would: leave them out, and log in by the environment or the"
            " files of the library (docs/data.md)"
        )
    return True


def scheme_of(address: AnyPath) -> str:
    """`gs` or `s3`, of a remote address."""
    return os.fspath(address).partition("://")[0]


def split(address: AnyPath) -> tuple[str, str]:
    """Bucket and key of a remote address; the key has no slash at its ends.

    Raises:
        ValueError: it names no bucket.
    """
    bucket, _, key = os.fspath(address).partition("://")[2].partition("/")
    if not bucket:
        raise ValueError(
            f"{os.fspath(address)!r} names no bucket: give {scheme_of(address)}"
            "://bucket/folder"
        )
    return bucket, key.strip("/")


def as_path(address: AnyPath) -> Any:
    """An `etils.epath.Path` of an address, an absolute `pathlib.Path` of a local one.

    Raises:
        ValueError: as of `is_remote`; or its library is not installed.
    """
    if not is_remote(address):
        return pathlib.Path(address).expanduser().absolute()
    require_library(address)
    set_up()
    from etils import epath

    bucket, key = split(address)
    return epath.Path("/".join(filter(None, (f"{scheme_of(address)}://{bucket}", key))))


def join(address: AnyPath, *names: str) -> str:
    """The address or the path of something below `address`, as a string."""
    if is_remote(address):
        return "/".join([os.fspath(address).rstrip("/"), *names])
    return os.path.join(address, *names)


def name(address: AnyPath) -> str:
    """The last part of an address or of a path; of a whole bucket, its name."""
    return os.fspath(address).rstrip("/").rpartition("/")[2]


def require_library(address: AnyPath) -> None:
    """Refuse an address whose library is not installed.

    Raises:
        ValueError: names the library and the extra.
    """
    scheme = scheme_of(address)
    library = LIBRARIES[scheme]
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"{os.fspath(address)!r}: {scheme}:// needs {library}, which is not"
            f" installed: pip install 'jaxtrain[{EXTRAS[scheme]}]'"
        )


@functools.cache
def set_up() -> None:
    """Make the libraries behave alike wherever they are used in this process.

    Without a cache of listings, which would not show what other processes and
    TensorStore write; and by one library, even where TensorFlow is installed.
    """
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Zonal buckets aside, this only asks for each bucket's kind.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from fsspec.config import conf

    for scheme in LIBRARIES:
        conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


def filesystem(address: AnyPath) -> Any:
    """The fsspec file system of a remote address.

    Raises:
        ValueError: its library is not installed.
    """
    require_library(address)
    set_up()
    import fsspec

    if scheme_of(address) == "gs":
        # The same arguments as etils gives, so that both share one.
        return fsspec.filesystem("gcs", finalize_on_close=True)
    return fsspec.filesystem("s3")
