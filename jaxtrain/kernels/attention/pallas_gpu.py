"""Flash attention for Hopper: the two passes under one name."""

import dataclasses
import functools

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.blocked import Kernels
from jaxtrain.kernels.attention.hopper_backward import backward
from jaxtrain.kernels.attention.hopper_forward import forward

KERNELS = Kernels(forward, backward, hopper.choose_blocks, hopper.choose_width)


def with_tiles(tiles: hopper.Tiles) -> Kernels:
    """The same with tiles of the caller's choice, to test and to measure them."""
    return dataclasses.replace(
        KERNELS,
        forward=functools.partial(forward, tiles=tiles),
        backward=functools.partial(backward, tiles=tiles),
    )
