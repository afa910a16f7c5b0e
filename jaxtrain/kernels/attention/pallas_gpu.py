"""Flash attention for Hopper: the two passes under one name."""

import dataclasses
import functools

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.blocked import Kernels
from jaxtrain.kernels.attention.hopper_backward import backward
from jaxtrain.kernels.attention.hopper_forward import forward

KERNELS = Kernels(forward, backward, hopper.choose_blocks, hopper.choose_width)


def with_tiles(tiles: hopper.Tiles) -> Kernels:
    """Return `KERNELS` with the caller's tile sizes, for tests and measurements."""
    return dataclasses.replace(
        KERNELS,
        forward=functools.partial(forward, tiles=tiles),
        backward=functools.partial(backward, tiles=tiles),
    )
