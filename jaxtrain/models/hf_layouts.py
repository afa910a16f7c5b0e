"""How tensors that rest in a bucket are dealt out for reading: by whole rows."""

import math

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxtrain.models.hf_names import Leaf


def split_by_rows(leaf: Leaf, sharding: Sharding) -> Sharding:
    """A layout that splits a leaf as finely, but no row of its tensors' matrices.

    A part of a row would be a request for each row. What splits the columns splits the
    rows instead, or the layers or experts, whichever can be divided so; if none can,
    the layout stays as it is.
    """
    columns = leaf.columns_axis
    if columns is None or not isinstance(sharding, NamedSharding):
        return sharding
    mesh, last = sharding.mesh, len(leaf.shape) - 1
    named = (*sharding.spec, *[None] * (last + 1 - len(sharding.spec)))
    spec = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in named]
    moving = [axis for axis in spec[columns] if mesh.shape[axis] > 1]
    rows = last if columns < last else last - 1
    for axis in (rows, *range(leaf.stacked_axes)) if moving else ():
        split = (*spec[axis], *moving)
        if leaf.shape[axis] % math.prod(mesh.shape[name] for name in split) == 0:
            spec[axis], spec[columns] = split, ()
            return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))
    return sharding
