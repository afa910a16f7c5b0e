"""Weights kept in float8 with scales beside them, shown as whole weights.

DeepSeek and Qwen publish matrices [O I] in float8 (e4m3) with `weight_scale_inv`
[O / rows, I / columns], rounded up: a block of 128 by 128 weights is multiplied by one
scale. Others have one scale for the matrix.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxtrain.models.hf_files import read_header
from jaxtrain.storage.reading import AnyFile, RemoteFile

_SCALE = "_scale_inv"
_TYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn}
# Ranges of activations, for inference in float8.
_ACTIVATIONS = (".activation_scale", ".input_scale")


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A float8 matrix [O I] times its scales. Behaves as a slice of safetensors.

    `codes` is mapped from the file, or read from the bucket as it is indexed; `scales`
    [O / rows, I / columns] is in memory.
    """

    codes: Any
    scales: np.ndarray
    block: tuple[int, int]

    def get_dtype(self) -> str:
        """bfloat16, which is what such weights were rounded from."""
        return "BF16"

    def get_shape(self) -> list[int]:
        """The matrix's numbers of rows and columns."""
        return list(self.codes.shape)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        places = [
            np.arange(*part.indices(size))
            for part, size in zip(index, self.codes.shape, strict=True)
        ]
        blocks = (place // size for place, size in zip(places, self.block, strict=True))
        return self.codes[index].astype(np.float32) * self.scales[np.ix_(*blocks)]


def whole_tensors(
    stored: Mapping[str, Any], file_of: Mapping[str, AnyFile], block: tuple[int, int]
) -> dict[str, Any]:
    """The tensors of a checkpoint, float8 matrices with their scales multiplied in.

    Args:
        stored: the tensors by name, as slices of safetensors.
        file_of: for each one its file.
        block: rows and columns that share a scale.

    Raises:
        ValueError: a matrix has no scales, or scales of another shape.
    """
    in_few_bits = {n for n, x in stored.items() if x.get_dtype() in _TYPES}
    if not in_few_bits:
        return dict(stored)
    tensors: dict[str, Any] = {}
    for name, tensor in stored.items():
        if name in in_few_bits:
            scales = stored.get(f"{name}{_SCALE}")
            codes = _map_codes(file_of[name], name, tensor)
            tensors[name] = _scaled(f"{file_of[name]}: {name}", codes, scales, block)
        elif not name.endswith((_SCALE, *_ACTIVATIONS)):
            tensors[name] = tensor
    return tensors


_header_of = functools.lru_cache(maxsize=1)(read_header)


def _map_codes(file: AnyFile, name: str, tensor: Any) -> Any:
    """A float8 tensor of a file, which numpy alone has no type for."""
    if isinstance(file, RemoteFile):
        return tensor
    header, start = _header_of(file)
    entry = header[name]
    return np.memmap(
        file,
        dtype=_TYPES[entry["dtype"]],
        mode="r",
        offset=start + entry["data_offsets"][0],
        shape=tuple(entry["shape"]),
    )


def _scaled(name: str, codes: Any, stored: Any, block: tuple[int, int]) -> _Scaled:
    if stored is None or codes.ndim != 2:
        raise ValueError(
            f"{name} is in float8, but no matrix with a {_SCALE[1:]} beside it: train"
            " the whole weights that it was made from"
        )
    scales = np.asarray(stored[:] if stored.get_shape() else stored[...], np.float32)
    if scales.size == 1:
        return _Scaled(codes, scales.reshape(1, 1), codes.shape)
    wanted = tuple(
        -(-size // part) for size, part in zip(codes.shape, block, strict=True)
    )
    if scales.shape != wanted:
        raise ValueError(
            f"{name} has scales of shape {scales.shape}, but a matrix of {codes.shape}"
            f" in blocks of {block} (quantization_config.weight_block_size) needs"
            f" scales of shape {wanted}"
        )
    return _Scaled(codes, scales, block)
