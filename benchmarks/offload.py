"""A full fine-tune that fits one GPU only with its optimizer state in host memory.

    PYTHONPATH=. python benchmarks/offload.py [--shape 7b] [--steps 3] [--limit_gib 80]

Compiles the step of AdamW with float32 weights and nothing in host memory (`none`), the
optimizer's state (`training.deepspeed.offload_optimizer`) or the weights too (`all`,
`offload_param`), prints what the compiler says that each needs on the device, and runs
those that fit the limit: seconds a step, losses (which must be equal), peak memory.
`--shape tiny` runs all anywhere. One line of JSON a part.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import sharding
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.objectives import make_objective
from jaxtrain.optimizers import offload as streamed
from jaxtrain.optimizers import optim
from jaxtrain.optimizers.schedules import make_schedule
from jaxtrain.run import distributed
from jaxtrain.step import StepOptions, make_train_step
from jaxtrain.types import Batch, TrainState

SHAPES = {
    "7b": {  # Qwen2.5-7B's
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip


def make_batch(rows: int, length: int, vocab: int) -> Batch:
    """Rows [1, B, T] without padding."""
    tokens = np.random.default_rng(0).integers(0, vocab, (1, rows, length + 1))
    ids = np.ones((1, rows, length), np.int32)
    return Batch(
        tokens=tokens[..., :-1].astype(np.int32),
        targets=tokens[..., 1:].astype(np.int32),
        segment_ids=ids,
        positions=np.arange(length, dtype=np.int32) * ids,
        loss_mask=ids.astype(np.float32),
    )


class Run:
    """One step and its state, laid out by a plan."""

    def __init__(self, shape: str, rows: int, length: int, *, offload: str) -> None:
        mesh = sharding.make_mesh(
            {axis: 1 for axis in sharding.MESH_AXES}, jax.devices()[:1]
        )
        plan = sharding.ShardingPlan(
            mesh, offload_optimizer=offload != "none", offload_params=offload == "all"
        )
        settings = {"model_type": "qwen2", "max_position_embeddings": 32768}
        config = ModelConfig.from_hf(settings | SHAPES[shape])
        decoder = Decoder(config, compute_dtype="bfloat16", remat="full", packed=False)
        schedule = make_schedule("constant", learning_rate=1e-5, total_steps=100)
        self.optimizer = optim.make_optimizer("adamw", schedule)
        abstract = decoder.abstract_params()
        axes = decoder.logical_axes()
        parameters = plan.parameters(abstract, axes)
        moments = optim.state_shardings(
            self.optimizer, abstract, plan.optimizer_moments(abstract, axes),
            plan.replicated,
        )  # fmt: skip
        stored = plan.store_optimizer(moments)
        layouts = TrainState(
            step=plan.replicated, trainable=parameters, frozen={}, opt_state=stored,
            rng=plan.replicated,
        )  # fmt: skip
        self.layouts, self.decoder = layouts, decoder
        options = streamed.offload(
            StepOptions(max_grad_norm=1.0), plan, self.optimizer, layouts
        )
        step = make_train_step(
            make_objective("next_token"), decoder.token_log_probs, self.optimizer,
            schedule, options,
        )  # fmt: skip
        self.step = jax.jit(
            step,
            in_shardings=(layouts, plan.batch(1)),
            out_shardings=(layouts, plan.replicated),
            donate_argnums=0,
        )
        self.batch = make_batch(rows, length, config.vocab_size)

    def compile(self) -> tuple[Any, dict[str, float]]:
        """The compiled step, and its memory in GiB."""
        state = jax.eval_shape(self._state, jax.random.key(0))
        state = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=layout
            ),
            state,
            self.layouts,
        )
        compiled = self.step.lower(state, self.batch).compile()
        memory = compiled.memory_analysis()
        names = ("argument", "temp", "alias", "host_argument", "host_temp")
        sizes = {n: getattr(memory, f"{n}_size_in_bytes") / 2**30 for n in names}
        return compiled, {name: round(size, 2) for name, size in sizes.items()}

    def _state(self, key: jax.Array) -> TrainState:
        params = self.decoder.init(key)
        return TrainState(
            step=jnp.int32(0), trainable=params, frozen={},
            opt_state=self.optimizer.init(params), rng=jax.random.key(1),
        )  # fmt: skip

    def init(self) -> TrainState:
        """As `models.state.init_state` does: the moments made where they are kept."""
        params = jax.jit(self.decoder.init, out_shardings=self.layouts.trainable)(
            jax.random.key(0)
        )
        opt_state = jax.jit(self.optimizer.init, out_shardings=self.layouts.opt_state)(
            params
        )
        return TrainState(
            step=jnp.int32(0), trainable=params, frozen={}, opt_state=opt_state,
            rng=jax.random.key(1),
        )  # fmt: skip


def say(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def run(case: Run, compiled: Any, steps: int, name: str) -> list[float]:
    start = time.perf_counter()
    state = jax.block_until_ready(case.init())
    say(offload=name, init_secs=round(time.perf_counter() - start, 1))
    batch, losses, times = jax.device_put(case.batch), [], []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"].mean()))
        times.append(time.perf_counter() - start)
    memory = jax.devices()[0].memory_stats() or {}
    say(
        offload=name,
        step_secs=[round(t, 2) for t in times],
        tokens_per_sec=round(case.batch.tokens.size / min(times), 1),
        losses=losses,
        peak_gib=round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
    )
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--offload", default="all,optimizer,none")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit_gib", type=float, default=80)
    arguments = parser.parse_args()
    distributed.allow_pinned_memory()
    sizes = (arguments.shape, arguments.rows, arguments.length)
    say(device=jax.devices()[0].device_kind, jax=jax.__version__, **vars(arguments))
    losses = []
    for offload in arguments.offload.split(","):
        case = Run(*sizes, offload=offload)
        compiled, memory = case.compile()
        needed = memory["argument"] + memory["temp"]
        fits = needed < arguments.limit_gib
        say(offload=offload, needs=round(needed, 2), fits=fits, gib=memory)
        if fits:
            losses.append(run(case, compiled, arguments.steps, offload))
        del case, compiled
    # The same sums in another order of operations.
    np.testing.assert_allclose(losses, [losses[0]] * len(losses), rtol=1e-5)


if __name__ == "__main__":
    main()
