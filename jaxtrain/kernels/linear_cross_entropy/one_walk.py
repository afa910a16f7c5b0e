"""Both passes of the loss head in one walk over the tokens, by kernels for Hopper.

The gradient of a token's log-prob is W[target] - sum_v p_v W_v by its hidden state h,
and (onehot(target) - p) h by the table. Of a slice of tokens and the whole vocabulary
a kernel writes exp(logit - base), which divided by the row's sum is p. This division is
left to the other factor of a product, or to its result, so that both products follow
while the sums are still being added up: logits are computed once, not again in the
backward pass.

That serves where a token's share of the loss is known beforehand, as in the next-token
loss, up to a factor that all tokens have in common; or where the table is frozen, for
then the share only scales a token's own gradient.

The base is the target's logit. Where a model is so wrong that another logit is far
above it, the kernel takes the highest one: so every weight is a number, and so is
1 / sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.linear_cross_entropy import fused

# Rows of a slice. More of them carry the table's gradient through memory less often;
# their weights take 2 bytes for each entry of the vocabulary.
_MOST_ROWS = 4096
_MOST_BYTES = 5 * 2**28


class Head(NamedTuple):
    """What is scored: all tokens, the whole table in their type, and its `of_table`.

    `shares`: each token's share of the loss, or None for the gradients of log-probs.
    """

    hidden: Float[Array, "M D"]
    table: Float[Array, "V D"] | Float[Array, "D V"]
    targets: Int32[Array, "M"]
    shares: Float[Array, "M"] | None
    of_table: tuple[int, float]


class Found(NamedTuple):
    """Of each token what a softmax tells, and the gradients of shares times log-probs.

    `logps`, `log_total`, `entropy` in nats, `correct` is 1 for the first highest logit.
    `table`: None where it is frozen.
    """

    logps: Float[Array, "M"]
    log_total: Float[Array, "M"]
    entropy: Float[Array, "M"]
    correct: Float[Array, "M"]
    hidden: Float[Array, "M D"]
    table: Float[Array, "V D"] | Float[Array, "D V"] | None


def choose_rows(tokens: int, vocab: int, chunk: int | None, *, trained: bool) -> int:
    """Of so many tokens those of a slice, at most.

    `chunk`: as in `linear_log_probs`; None: by the sizes. Under a frozen table there is
    no gradient to carry, and of fewer tokens half as many do.
    """
    if chunk is not None:
        return 3 * chunk  # a weight has 2 bytes, a logit and its slope 6
    rows = min(_MOST_ROWS, _MOST_BYTES // (2 * vocab))
    return rows if trained else min(rows, max(rows // 2, tokens // 4))


def walk(tiles: Any, head: Head, most_rows: int, *, trained: bool) -> Found:
    """Score all tokens, `most_rows` or fewer at once; `trained`: the table is, too."""
    tokens = len(head.hidden)
    count = -(-tokens // max(most_rows, fused.ROW_MULTIPLE))
    rows = -(-tokens // (count * fused.ROW_MULTIPLE)) * fused.ROW_MULTIPLE
    count = -(-tokens // rows)

    def cut(x: Array) -> Array:
        tail = [(0, count * rows - tokens)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, tail).reshape(count, rows, *x.shape[1:])

    shares = head.shares
    given = (head.hidden, head.targets, *(() if shares is None else (shares,)))
    pieces = tuple(map(cut, given))
    own = jnp.take(head.table, head.targets, axis=head.of_table[0])
    own = own if head.of_table[0] == 0 else own.T
    exact = head.hidden.astype(jnp.float32) * own.astype(jnp.float32)
    bases = cut(exact.sum(-1) * head.of_table[1])
    score = _make_scorer(tiles, head)
    zeros = jnp.zeros(head.table.shape, jnp.float32) if trained else None
    table, found = jax.lax.scan(
        lambda table, piece: score(table, *piece), zeros, (pieces, bases)
    )
    joined = {
        name: x.reshape(count * rows, *x.shape[2:])[:tokens]
        for name, x in found.items()
    }
    return Found(**joined, table=table)


def _make_scorer(tiles: Any, head: Head) -> Callable[..., Any]:
    """Build `score(table's sum, tokens, base)` of a slice of the tokens.

    It returns the table's sum, None for a frozen one, and what was found.
    """
    vocab_axis, scale = head.of_table
    dims = (((1,), (vocab_axis,)), ((), ()))

    def score(
        table: Array | None, pieces: tuple[Array, ...], base: Array
    ) -> tuple[Array | None, dict[str, Array]]:
        hidden, targets, *shares = pieces
        rows = jnp.arange(len(hidden))
        weighed = fused.weigh_logits(
            tiles, hidden, head.table, targets, base, head.of_table
        )
        total = weighed.others + jnp.exp(weighed.target - weighed.base)
        log_total = weighed.base + jnp.log(total)
        # What is less than one at the target: the slope of a log-prob, times -total.
        pulls = weighed.weights.at[rows, targets].set(
            -weighed.others.astype(hidden.dtype),
            indices_are_sorted=True,
            unique_indices=True,
        )
        factor = -scale / total
        if shares:
            factor = factor * shares[0]
        pulled = jax.lax.dot_general(
            pulls, head.table, dims, preferred_element_type=jnp.float32
        )
        of_hidden = jnp.float32 if head.shares is None else hidden.dtype
        found = {
            "logps": weighed.target - log_total,
            "log_total": log_total,
            "entropy": log_total - weighed.weighted / total,
            "correct": weighed.is_first,
            "hidden": (pulled * factor[:, None]).astype(of_hidden),
        }
        if table is not None:
            scaled = (hidden * factor[:, None]).astype(hidden.dtype)
            pair = (pulls, scaled) if vocab_axis == 0 else (scaled, pulls)
            table += jax.lax.dot_general(
                *pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return table, found

    return score
