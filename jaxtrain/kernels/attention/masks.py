"""Which key each query may read: one rule for every implementation.

Query t reads key s where all of these hold:

- both belong to a document (`segment_ids` not 0) and s is in t's segment, or in the
  segment that `prompt_ids[t]` names (a shared prompt; 0 names none);
- s <= t, in index order, where attention is causal;
- t - s < window, where there is a window.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The rule above for one batch; without segments every key is in one document.

    The queries may be a part of the row: `offset` is the index of the first of them
    among the keys, and `key_ids` are the segments of all keys (None: `segment_ids`).
    """

    segment_ids: Int32[Array, "B T"] | None = None
    prompt_ids: Int32[Array, "B T"] | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    key_ids: Int32[Array, "B S"] | None = None
    offset: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def keys(self) -> Int32[Array, "B S"] | None:
        """Segments of the keys."""
        return self.segment_ids if self.key_ids is None else self.key_ids


@dataclasses.dataclass(frozen=True)
class Extras:
    """What else a call asks of an implementation, by which one is chosen.

    `value_width`: of the values, None: as wide as the keys.
    """

    softcap: float | None = None
    has_sinks: bool = False
    value_width: int | None = None


def attends(
    mask: Mask,
    query_index: Int32[Array, "T"],
    key_index: Int32[Array, "S"],
    query_ids: Int32[Array, "B T"] | None,
    prompt_ids: Int32[Array, "B T"] | None,
    key_ids: Int32[Array, "B S"] | None,
) -> Bool[Array, "_ T S"] | None:
    """True where a query may read a key; None where every query reads every key.

    The ids are those of the given queries and keys, which may be parts of the rows.
    The first axis is 1 where the answer is the same for every row.
    """
    distance = query_index[:, None] - key_index[None, :]
    allowed = None
    if mask.causal:
        allowed = (distance >= 0)[None]
    if mask.window is not None:
        near = (distance < mask.window)[None]
        allowed = near if allowed is None else allowed & near
    if query_ids is not None and key_ids is not None:
        keys = key_ids[:, None, :]
        same = query_ids[:, :, None] == keys
        if prompt_ids is not None:
            same |= prompt_ids[:, :, None] == keys
        same &= (keys != 0) & (query_ids != 0)[:, :, None]
        allowed = same if allowed is None else allowed & same
    return allowed


def whole_mask(mask: Mask, queries: int, keys: int) -> Bool[Array, "_ T S"] | None:
    """`attends` for all queries and keys of `mask`."""
    return attends(
        mask,
        mask.offset + jnp.arange(queries, dtype=jnp.int32),
        jnp.arange(keys, dtype=jnp.int32),
        mask.segment_ids,
        mask.prompt_ids,
        mask.keys,
    )
