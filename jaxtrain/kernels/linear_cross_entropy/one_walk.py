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

The base is the target's logit. Where a model is so wrong that another logit is more
than `_FAR` above it, the walk is repeated for these tokens, with their highest logit
for the base: so every weight is a number, and so is 1 / sum. Once is nearly always
enough.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.linear_cross_entropy import fused

_FAR = 60.0  # nats; kernels cut off at 75
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
    score = _make_scorer(tiles, head)
    zeros = jnp.zeros((count, rows), jnp.float32)
    own = jnp.take(head.table, head.targets, axis=head.of_table[0])
    own = own if head.of_table[0] == 0 else own.T
    exact = head.hidden.astype(jnp.float32) * own.astype(jnp.float32)
    found = {name: zeros for name in ("logps", "log_total", "entropy", "correct")}
    of_hidden = jnp.float32 if shares is None else head.hidden.dtype
    start: dict[str, Any] = {
        "base": cut(exact.sum(-1) * head.of_table[1]),
        "left": jnp.ones((count, rows), bool),
        "found": found | {"hidden": jnp.zeros(pieces[0].shape, of_hidden)},
        "table": jnp.zeros(head.table.shape, jnp.float32) if trained else None,
    }

    def turn(state: dict[str, Any]) -> dict[str, Any]:
        def step(table: Any, piece: Any) -> tuple[Any, Any]:
            return score(table, *piece)

        inputs = (pieces, state["base"], state["left"], state["found"])
        table, (found, highest) = jax.lax.scan(step, state["table"], inputs)
        left = state["left"] & (highest > state["base"] + _FAR)
        base = jnp.where(left, highest, state["base"])
        return {"base": base, "left": left, "found": found, "table": table}

    end = jax.lax.while_loop(lambda state: state["left"].any(), turn, start)
    joined = {
        name: x.reshape(count * rows, *x.shape[2:])[:tokens]
        for name, x in end["found"].items()
    }
    return Found(**joined, table=end["table"])


def _make_scorer(tiles: Any, head: Head) -> Callable[..., Any]:
    """Build `score(table's sum, tokens, base, left, found)` of a slice of the tokens.

    It returns the table's sum, None for a frozen one, and, in a pair, what was found
    and the highest logits. Tokens that are not `left` keep what was found of them.
    """
    vocab_axis, scale = head.of_table
    dims = (((1,), (vocab_axis,)), ((), ()))

    def score(
        table: Array | None,
        pieces: tuple[Array, ...],
        base: Array,
        left: Array,
        old: Any,
    ) -> tuple[Array | None, tuple[dict[str, Array], Array]]:
        hidden, targets, *shares = pieces
        rows = jnp.arange(len(hidden))
        weighed = fused.weigh_logits(
            tiles, hidden, head.table, targets, base, head.of_table
        )
        total = weighed.others + jnp.exp(weighed.target - base)
        log_total = base + jnp.log(total)
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
        new = {
            "logps": weighed.target - log_total,
            "log_total": log_total,
            "entropy": log_total - weighed.weighted / total,
            "correct": weighed.is_first,
        }
        found = {name: jnp.where(left, x, old[name]) for name, x in new.items()}
        found["hidden"] = jnp.where(
            left[:, None],
            (pulled * factor[:, None]).astype(old["hidden"].dtype),
            old["hidden"],
        )
        if table is not None:
            near = left & (weighed.highest <= base + _FAR)
            factor = jnp.where(near, factor, 0.0)
            scaled = (hidden * factor[:, None]).astype(hidden.dtype)
            pair = (pulls, scaled) if vocab_axis == 0 else (scaled, pulls)
            table += jax.lax.dot_general(
                *pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return table, (found, weighed.highest)

    return score
