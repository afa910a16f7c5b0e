"""A fingerprint of the weights in a directory: are they still the same ones?

It is read off the files, so neither the mesh nor the dtype that they are loaded in
changes it, nor how the tensors are spread over shards.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxtrain.models.bucket import weight_file
from jaxtrain.models.hf_files import read_header
from jaxtrain.models.hf_names import WEIGHTS, WEIGHTS_INDEX
from jaxtrain.storage.reading import AnyFile, RemoteFile

_Ranges: TypeAlias = list[tuple[int, int]]

# Of each block of a tensor so many bytes enter; a tensor smaller than a block enters
# whole. Of 6 GB that is 24 MB, read in a small part of the time of loading them.
_BLOCK, _SAMPLE = 1 << 20, 1 << 12


def fingerprint_model(directory: str | pathlib.Path) -> str:
    """Fingerprint the safetensors of a Hugging Face directory."""
    folder = pathlib.Path(directory)
    if (whole := weight_file(folder, WEIGHTS)).is_file():
        return fingerprint_files([whole])
    weight_map = json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"]
    names = set(weight_map.values())
    return fingerprint_files(weight_file(folder, name) for name in names)


def fingerprint_files(files: Iterable[AnyFile]) -> str:
    """A hash of every tensor's name, type and shape and of samples of its bytes.

    Other weights of the same shapes differ in all or most numbers, and 4 KiB of every
    MiB are looked at; a change of a few numbers in a large tensor may go unseen.
    """
    digest = hashlib.blake2b(digest_size=8)
    listed = [(tensor, _reader(file)) for file in files for tensor in _tensors(file)]
    for tensor, read in sorted(listed, key=lambda each: each[0]):
        digest.update(f"{tensor.name} {tensor.described}\0".encode())
        for sample in read(_samples(tensor)):
            digest.update(sample)
    return digest.hexdigest()


class _Tensor(NamedTuple):
    """A tensor's name, type and shape, and its first byte and end in its file."""

    name: str
    described: str
    start: int
    stop: int


def _reader(file: AnyFile) -> Callable[[_Ranges], Iterable[bytes]]:
    """What gives the bytes of ranges of a file, mapped where it is on the disk."""
    if isinstance(file, RemoteFile):
        return file.read_all
    bytes_of = np.memmap(file, np.uint8, "r")
    return lambda ranges: (bytes_of[start:stop].tobytes() for start, stop in ranges)


def _tensors(file: AnyFile) -> Iterator[_Tensor]:
    header, first = read_header(file)
    for name, entry in header.items():
        start, stop = (first + offset for offset in entry["data_offsets"])
        yield _Tensor(name, f"{entry['dtype']} {entry['shape']}", start, stop)


def _samples(tensor: _Tensor) -> _Ranges:
    """Parts of a tensor's bytes: the start of each block, and the end."""
    start, stop = tensor.start, tensor.stop
    whole = start + (stop - start) // _BLOCK * _BLOCK
    if whole == start:
        return [(start, stop)]
    blocks = [(at, at + _SAMPLE) for at in range(start, whole, _BLOCK)]
    return [*blocks, (whole, min(whole + _SAMPLE, stop)), (stop - _SAMPLE, stop)]
