"""A fingerprint of the weights in a directory: are they still the same ones?

It is read off the files, so neither the mesh nor the dtype that they are loaded in
changes it, nor how the tensors are spread over shards.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from jaxtrain.models.hf_names import WEIGHTS, WEIGHTS_INDEX

# Of each block of a tensor so many bytes enter; a tensor smaller than a block enters
# whole. Of 6 GB that is 24 MB, read in a small part of the time of loading them.
_BLOCK, _SAMPLE = 1 << 20, 1 << 12
_HEADER_LENGTH = 8  # bytes in front of a safetensors header that give its length


def fingerprint_model(directory: str | pathlib.Path) -> str:
    """Fingerprint the safetensors of a Hugging Face directory."""
    folder = pathlib.Path(directory)
    if (folder / WEIGHTS).is_file():
        return fingerprint_files([folder / WEIGHTS])
    weight_map = json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"]
    return fingerprint_files(folder / name for name in set(weight_map.values()))


def fingerprint_files(files: Iterable[pathlib.Path]) -> str:
    """A hash of every tensor's name, type and shape and of samples of its bytes.

    Other weights of the same shapes differ in all or most numbers, and 4 KiB of every
    MiB are looked at; a change of a few numbers in a large tensor may go unseen.
    """
    tensors = sorted(entry for file in files for entry in _tensors(file))
    digest = hashlib.blake2b(digest_size=8)
    maps: dict[pathlib.Path, np.ndarray] = {}
    for name, described, file, start, stop in tensors:
        digest.update(f"{name} {described}\0".encode())
        if file not in maps:
            maps[file] = np.memmap(file, np.uint8, "r")
        for sample in _samples(maps[file][start:stop]):
            digest.update(np.ascontiguousarray(sample).data)
    return digest.hexdigest()


def _tensors(file: pathlib.Path) -> Iterator[tuple[str, str, pathlib.Path, int, int]]:
    """Name, type and shape, file, first byte and end of each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_HEADER_LENGTH), "little")
        header = json.loads(opened.read(length))
    first = _HEADER_LENGTH + length
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (first + offset for offset in entry["data_offsets"])
            yield name, f"{entry['dtype']} {entry['shape']}", file, start, stop


def _samples(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of a tensor's bytes: the start of each block, and the whole last one."""
    blocks = len(tensor) // _BLOCK
    whole = blocks * _BLOCK
    if blocks:
        yield tensor[:whole].reshape(blocks, _BLOCK)[:, :_SAMPLE]
        yield tensor[whole:][:_SAMPLE]
        yield tensor[-_SAMPLE:]
    else:
        yield tensor
