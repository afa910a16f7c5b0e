"""Flash attention for Hopper: the two passes under one name."""

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.blocked import Kernels
from jaxtrain.kernels.attention.hopper_backward import backward
from jaxtrain.kernels.attention.hopper_forward import forward

KERNELS = Kernels(forward, backward, hopper.choose_blocks, hopper.choose_width)
