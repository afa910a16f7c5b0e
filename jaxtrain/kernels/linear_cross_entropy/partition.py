"""The loss head's kernels on a mesh: each device scores its own tokens.

The compiler cannot cut a kernel by itself, so the head stands in a `jax.shard_map`. A
token needs the whole unembedding: where devices split its width, each brings the parts
together in the type of the hidden states, and gets its part of the gradient's sum. That
is added up over devices in the type of the unembedding that is given.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.linear_cross_entropy import fused

# Bytes of a whole unembedding in 16 bits with its gradient in float32. With more than
# these, slices that are gathered and summed one by one are worth their time.
_LARGEST = 4 * 2**30


def serves(
    layout: Layout, hidden: Float[Array, "B T D"], vocab: int, device: jax.Device | None
) -> bool:
    """Whether kernels would score each device's tokens, on this mesh or on one device.

    `device` is one that the program is for, where it is not the first local one.
    """
    rows, length, width = hidden.shape
    several = layout.mesh is not None and layout.mesh.size > 1
    if several and (layout.count(layout.vocab) > 1 or vocab * width * 6 > _LARGEST):
        return False
    tokens = rows * length // layout.count(layout.sharing(rows, length))
    own = jax.ShapeDtypeStruct((tokens, width), hidden.dtype)
    return fused.choose_tiles(own, vocab, device) is not None


def score_on_shards(
    score: Callable[..., tuple[Array, ...]],
    layout: Layout,
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"] | Float[Array, "D V"],
    told: tuple[Int32[Array, "B T"], Float[Array, "B T"] | None],
    vocab_axis: Literal[0, 1],
) -> tuple[Float[Array, "M"], ...]:
    """`score(hidden, unembedding, targets, width_axes=...)` on each device's tokens.

    `told`: the targets, and each token's share of the loss if `score` shall know it.
    The results are of the tokens as `layout.join_tokens` joins them, or of the devices.
    """
    mesh = layout.mesh
    assert mesh is not None  # one device needs none of this
    tokens = layout.sharing(*hidden.shape[:2])
    width = layout.fitting(
        tuple(axis for axis in layout.weights if mesh.shape[axis] > 1),
        unembedding.shape[1 - vocab_axis],
    )

    def run(hidden: Array, table: Array, *told: Array) -> tuple[Array, ...]:
        named = dict(zip(("targets", "shares"), told, strict=False))
        return score(hidden, table, **named, width_axes=width)

    given = tuple(layout.join_tokens(x) for x in told if x is not None)
    # Axes that a spec does not name cost a sum of gradients, be they of size 1.
    idle = tuple(axis for axis, size in mesh.shape.items() if size == 1)
    tokens += tuple(axis for axis in idle if axis not in tokens)
    of_tokens = PartitionSpec(tokens)
    of_table = (idle or None, width or None)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(
            of_tokens,
            PartitionSpec(*of_table[:: 1 - 2 * vocab_axis]),
            *(of_tokens for _ in given),
        ),
        out_specs=of_tokens,
        check_vma=False,  # a kernel does not say over which axes its outputs vary
    )(layout.join_tokens(hidden), unembedding, *given)
