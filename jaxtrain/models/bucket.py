"""Models in a bucket: their small files on the local disk, their weights left there.

`fetch_model` copies a model's folder but for its weights. The copy stands for the model
everywhere; `weight_file` gives a file of its weights, which is in the bucket, and
`weight_files` reads tensors of either kind of file alike.
"""

import contextlib
import pathlib
from collections.abc import Iterator

from jaxtrain.config.folders import bucket_cache
from jaxtrain.storage import mirror
from jaxtrain.storage.reading import AnyFile


def fetch_model(address: str) -> pathlib.Path:
    """Copy a model's folder from a bucket to disk; the weights stay in the bucket.

    Raises:
        ValueError, OSError: there is no such folder, or it cannot be read.
    """
    return mirror.mirror_model(address, bucket_cache())


def shown(directory: str) -> str:
    """How the user named a model's directory.

    If it is a local copy from a bucket, that is the address in the bucket.
    """
    return mirror.origin(directory, bucket_cache()) or directory


@contextlib.contextmanager
def named_as_given(directory: str | pathlib.Path) -> Iterator[None]:
    """Name a copy's address in a ValueError, in place of the copy."""
    try:
        yield
    except ValueError as error:
        given, here = shown(str(directory)), str(directory)
        if given == here:
            raise
        raise ValueError(str(error).replace(here, given)) from error


def weight_file(directory: pathlib.Path, name: str) -> AnyFile:
    """A file of weights in a directory, whether or not it is there."""
    return mirror.staying(directory, bucket_cache()).get(name) or directory / name


def weight_names(directory: pathlib.Path) -> list[str]:
    """The names of all files in a directory, sorted; weights in a bucket as well."""
    on_disk = (file.name for file in directory.glob("*"))
    return sorted({*on_disk, *mirror.staying(directory, bucket_cache())})
