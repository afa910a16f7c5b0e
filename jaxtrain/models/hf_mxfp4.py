"""Experts kept in MXFP4 with scales beside them, shown as whole weights.

gpt-oss is published so: a stack of matrices [E I O] as `*_blocks` [E O I/32 16], bytes
of two 4-bit floats (E2M1), the lower one first, and `*_scales` [E O I/32], a power of
two for each 32 weights (E8M0, OCP Microscaling Formats 1.0).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxtrain.storage.reading import AnyFile

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32  # weights that share a scale
_BIAS = 127  # of the scales' exponents
_MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A stack [E I O] in MXFP4, of its columns each `step`-th from `first` on.

    Behaves as a slice of a safetensors file.
    """

    blocks: Any
    scales: Any
    first: int = 0
    step: int = 1

    def get_dtype(self) -> str:
        """bfloat16, which holds each such number exactly but for the smallest."""
        return "BF16"

    def get_shape(self) -> list[int]:
        """Experts, inputs, outputs."""
        experts, outputs, blocks, _ = self.blocks.get_shape()
        return [experts, blocks * _BLOCK, outputs // self.step]

    def every_other(self, first: int) -> "_Packed":
        """Half of the columns, of which no other is decoded."""
        return dataclasses.replace(self, first=first, step=2)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, inputs, outputs = index
        _, width, height = self.get_shape()
        start, stop, _ = inputs.indices(width)
        first, last, _ = outputs.indices(height)
        rows = slice(first * self.step, last * self.step)
        blocks = slice(start // _BLOCK, -(-stop // _BLOCK))
        places = (slice(None), slice(self.first, None, self.step))
        codes = self.blocks[experts, rows, blocks, :][places]
        scales = self.scales[experts, rows, blocks][places]
        places_in_table = scales[..., None].astype(np.uint16) << 8 | codes
        values = _pairs()[places_in_table].reshape(*codes.shape[:2], -1)
        values = values.view(ml_dtypes.bfloat16)
        offset = blocks.start * _BLOCK
        return values[..., start - offset : stop - offset].swapaxes(1, 2)


@functools.cache
def _pairs() -> np.ndarray:
    """The two weights of each byte under each scale, [scales * bytes], as 32 bits."""
    codes = np.asarray([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
    codes[8] = -0.0
    pairs = np.stack([np.tile(codes, 16), np.repeat(codes, 16)], axis=1)
    powers = np.arange(256, dtype=np.int32)[:, None, None] - _BIAS
    with np.errstate(over="ignore"):
        values = np.ldexp(pairs, powers).astype(ml_dtypes.bfloat16)
    return values.view(np.uint32).reshape(-1)


def whole_stacks(
    stored: Mapping[str, Any], file_of: Mapping[str, AnyFile]
) -> dict[str, Any]:
    """The tensors of a checkpoint, those in MXFP4 as the weights that they stand for.

    Args:
        stored: the tensors by name, as slices of safetensors.
        file_of: for each one its file.

    Raises:
        ValueError: blocks have no scales, or of another shape.
    """
    tensors: dict[str, Any] = {}
    for name, tensor in stored.items():
        if name.endswith(_BLOCKS) and tensor.get_dtype() == "U8":
            whole = name.removesuffix(_BLOCKS)
            scales = stored.get(f"{whole}{_SCALES}")
            shape = list(tensor.get_shape())
            if scales is None or shape != [*scales.get_shape(), _BLOCK // 2]:
                found = "none" if scales is None else f"{list(scales.get_shape())}"
                raise ValueError(
                    f"{file_of[name]}: {name} of shape {shape} needs {whole}{_SCALES}"
                    f" of shape {shape[:-1]}, but there is {found}: download the model"
                    " again"
                )
            tensors[whole] = _Packed(tensor, scales)
        elif not (name.endswith(_SCALES) and tensor.get_dtype() == "U8"):
            tensors[name] = tensor
    return tensors
