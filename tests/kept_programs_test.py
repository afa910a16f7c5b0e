"""Steps traced by an earlier run: the same numbers, found only by an equal step."""

import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from jaxtrain import sharding, step
from jaxtrain.kernels.attention import api
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.objectives import make_objective
from jaxtrain.run import (
    closures,
    compilation_cache,
    fitted_step,
    fp8_step,
    kept_programs,
)
from jaxtrain.run.step_programs import StepPrograms
from jaxtrain.types import Batch, TrainState
from tests.runs import tiny_config, train

pytest.importorskip("flatbuffers", reason="jax.export writes no files without it")

SIZES = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
# jax's, which a run sets.
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)
OPTIMIZER = optax.adamw(1e-2)


def make_plan():
    return sharding.ShardingPlan(sharding.make_mesh({"data": 1}, jax.devices()[:1]))


def jit_step(plan, state, clip=1.0, score=None, **options):
    """The train step, jitted as `build.make_steps` does."""
    decoder = Decoder(ModelConfig.from_hf(SIZES), scan_layers=False, **options)
    train_step = step.make_train_step(
        make_objective("next_token"),
        score or decoder.token_log_probs,
        OPTIMIZER,
        optax.constant_schedule(1e-2),
        step.StepOptions(max_grad_norm=clip),
    )
    layouts = sharding.layouts_of(state)
    return plan.jit(
        train_step,
        in_shardings=(layouts, plan.batch(1)),
        out_shardings=(layouts, plan.replicated),
        donate_argnums=0,
    )


def make_state(plan):
    params = Decoder(ModelConfig.from_hf(SIZES)).init(jax.random.key(0))
    state = TrainState(
        step=jnp.int32(0),
        trainable=params,
        frozen={},
        opt_state=OPTIMIZER.init(params),
        rng=jax.random.key(1),
    )
    return jax.device_put(state, plan.replicated)


def make_batch(plan, length):
    rng = np.random.default_rng(length)
    shape = (1, 1, length)
    ids = rng.integers(0, 32, (2, *shape), np.int32)
    batch = Batch(
        tokens=ids[0],
        targets=ids[1],
        segment_ids=np.broadcast_to(np.arange(length) // 6 + 1, shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(length) % 6, shape).astype(np.int32),
        loss_mask=np.ones(shape, np.float32),
    )
    return sharding.place_batch(batch, plan.batch(1))


def host(tree):
    """The leaves as numpy arrays, keys as their data."""

    def data(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return [data(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def keeper(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_in_use", str(tmp_path))
    kept = kept_programs.keep_programs(make_plan())
    assert kept is not None and kept.folder.parent == tmp_path
    return kept


def count_traces(monkeypatch):
    """How often the decoder is traced from here on, as a list that grows."""
    # Not a function that the step closes over, for those are a part of the key.
    traces, traced = [], Decoder._hidden_states_and_load

    def counting(self, *args):
        traces.append(1)
        return traced(self, *args)

    monkeypatch.setattr(Decoder, "_hidden_states_and_load", counting)
    return traces


def files(keeper):
    return sorted(keeper.folder.glob("*.step"))


def test_a_second_start_traces_nothing_and_steps_alike(keeper, monkeypatch):
    plan, traces = keeper.plan, count_traces(monkeypatch)
    batches = [make_batch(plan, length) for length in (12, 24)]
    # As jax does it by itself, then twice with what is kept.
    found = []
    for kept in (None, keeper, keeper):
        jax.clear_caches()
        traces.clear()
        state = make_state(plan)
        programs = StepPrograms(jit_step(plan, state), kept)
        programs.compile(state, batches)
        count = len(traces)
        leaf = state.trainable["embed_tokens"]["embedding"]
        metrics = []
        for batch in (*batches, *batches):
            state, numbers = programs(state, batch)
            metrics.append(numbers)
        assert leaf.is_deleted()  # the state is donated
        found.append((count, host(state), host(metrics), metrics[0].keys()))
        layouts = sharding.layouts_of(state)
        assert layouts == sharding.layouts_of(make_state(plan))
    plainly, first, second = found
    assert plainly[0] > 0 and first[0] > 0 and second[0] == 0
    assert len(files(keeper)) == 2
    for other in (first, second):
        assert other[3] == plainly[3]
        for one, same in zip(plainly[1] + plainly[2], other[1] + other[2], strict=True):
            np.testing.assert_array_equal(one, same)


def test_a_second_run_reads_the_steps_that_the_first_one_traced(tmp_path, monkeypatch):
    """Through the trainer; the two runs log the same losses."""
    monkeypatch.setattr(compilation_cache, "_in_use", None)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    traces, losses = count_traces(monkeypatch), []
    config = tiny_config("sft", max_steps=2, save_steps=0, save_final_model=False)
    config.training.compilation_cache.dir = str(tmp_path / "cache")
    try:
        for name in ("one", "two"):
            jax.clear_caches()
            traces.clear()
            losses.append(train(config, tmp_path / name)["final_loss"])
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()
    assert list(tmp_path.glob("cache/*/traced/*.step"))
    assert traces == [] and losses[0] == losses[1]


def test_steps_that_are_read_or_fitted_to_memory_are_kept_too(keeper, monkeypatch):
    """Each policy that is tried, and a program is read before it runs as ever."""
    plan, traces, checked = keeper.plan, count_traces(monkeypatch), []
    monkeypatch.setattr(fitted_step, "REMATS", ("none", "full"))
    monkeypatch.setattr(fitted_step, "memory_limit", lambda device: 1)  # fits neither
    monkeypatch.setattr(
        fp8_step, "check_products", lambda text, expected: checked.append(text)
    )
    batch, expected = make_batch(plan, 12), fp8_step.Expected(frozenset(), 1, 1, 1)
    found = []
    for _ in range(2):
        jax.clear_caches()
        traces.clear()
        checked.clear()
        state = make_state(plan)

        def make_checked(remat, state=state):
            return fp8_step.CheckedStep(jit_step(plan, state, remat=remat), expected)

        device = plan.mesh.devices.flat[0]
        fitted = fitted_step.FittedStep(make_checked, device)
        programs = StepPrograms(fitted, keeper)
        programs.compile(state, [batch])
        _, metrics = programs(state, batch)
        assert len(checked) == 2 and "HloModule" in checked[0]
        found.append((len(traces), host(metrics)))
    assert found[0][0] > 0 and found[1][0] == 0
    assert len(files(keeper)) == len(keeper.found) == 2
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_another_step_is_another_file(keeper, monkeypatch):
    """What changes the program changes its name; what doesn't, does not."""
    plan = keeper.plan
    state = make_state(plan)

    def name(length=12, **options):
        jitted = jit_step(plan, state, **options)
        batch = make_batch(plan, length)
        return kept_programs._key(jitted, plan, state, batch)

    names = [name(), name(length=18), name(clip=2.0), name(remat="full")]
    names.append(name(compute_dtype="float16"))
    names.append(name(fp8=True))
    with jax.default_matmul_precision("highest"):
        names.append(name())
    kept_programs._sources.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kept_programs, "_PACKAGE", pathlib.Path(__file__).parent)
        names.append(name())
    kept_programs._sources.cache_clear()
    assert len(set(names)) == len(names)
    assert name() == names[0]


def test_code_of_ones_own_is_never_kept_and_the_log_says_so_once(keeper, caplog):
    """No key tells what is in it; it is traced at each start."""
    caplog.set_level("INFO", "jaxtrain")
    plan = keeper.plan
    state, batch = make_state(plan), make_batch(plan, 12)
    decoder = Decoder(ModelConfig.from_hf(SIZES))

    def own_score(params, batch, *, dropout_key=None):
        return decoder.token_log_probs(params, batch, dropout_key=dropout_key)

    jitted = jit_step(plan, state, score=own_score)
    with pytest.raises(closures.UnknownCode, match="own_score"):
        closures.describe(jitted.__wrapped__)
    _, metrics = keeper.lower(jitted, state, batch).compile()(state, batch)
    assert np.isfinite(metrics["loss"].total) and files(keeper) == []
    keeper.lower(jitted, make_state(plan), batch)
    (line,) = [line for line in caplog.messages if "is not kept" in line]
    assert "own_score, whose code no key can tell" in line


def test_what_was_logged_at_tracing_is_logged_again(keeper, caplog, monkeypatch):
    """The choice of attention is known only to a run that traces."""
    caplog.set_level("INFO", "jaxtrain")
    plan, lines = keeper.plan, []
    monkeypatch.setattr(api, "_logged", set())  # it says each thing once
    for _ in range(2):
        jax.clear_caches()
        caplog.clear()
        state = make_state(plan)
        keeper.lower(jit_step(plan, state), state, make_batch(plan, 12))
        told = {r for r in caplog.record_tuples if "attention: auto" in r[2]}
        lines.append(told)
    assert len(keeper.found) == 1 and len(lines[0]) == 1 and lines[0] == lines[1]


def test_a_program_for_a_gpu_finds_the_runtime_of_its_kernels(keeper, monkeypatch):
    """Importing Mosaic tells XLA where it is; without tracing nothing else does."""

    class OnGpu(sharding.ShardingPlan):
        platform = "gpu"

    plan = OnGpu(keeper.plan.mesh)
    state, batch = make_state(plan), make_batch(plan, 12)
    kept = kept_programs.KeptPrograms(keeper.folder, plan)
    kept.lower(jit_step(keeper.plan, state), state, batch)
    monkeypatch.delitem(sys.modules, kept_programs._MOSAIC, raising=False)
    kept.lower(jit_step(keeper.plan, state), state, batch)
    assert len(kept.found) == 1 and kept_programs._MOSAIC in sys.modules


@pytest.mark.gpu
def test_a_second_process_on_a_gpu_runs_what_it_did_not_trace(tmp_path):
    """Heads of 64 in bfloat16 take the kernels of the GPU's kind."""
    program = f"""if True:
        from tests.runs import tiny_config, train
        config = tiny_config("from_scratch", max_steps=2, save_steps=0)
        config.training.bf16, config.training.save_final_model = True, False
        config.data.max_length = config.model.architecture.hidden_size = 256
        config.model.architecture.num_attention_heads = 4
        config.model.architecture.num_key_value_heads = 2
        config.training.compilation_cache.dir = {str(tmp_path / "cache")!r}
        print("loss", train(config, {str(tmp_path)!r} + "/out")["final_loss"])"""
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        told.append(done.stdout.splitlines()[-1])
        shutil.rmtree(tmp_path / "out")
    assert told[0] == told[1]
    assert "an earlier run had traced 1" in done.stderr + done.stdout


def test_a_damaged_file_is_traced_anew(keeper):
    plan = keeper.plan
    state, batch = make_state(plan), make_batch(plan, 12)
    jitted = jit_step(plan, state)
    keeper.lower(jitted, state, batch)
    (file,) = files(keeper)
    whole = file.read_bytes()
    flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    for damaged in (whole[:-9], flipped, b""):
        file.write_bytes(damaged)
        assert kept_programs._read(file) is None
    keeper.lower(jitted, state, batch)
    assert kept_programs._read(file) is not None and not keeper.found


def test_a_folder_that_cannot_be_written_stops_nothing(keeper, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_programs.durable, "write_whole", full)
    plan = keeper.plan
    state, batch = make_state(plan), make_batch(plan, 12)
    _, metrics = (
        keeper.lower(jit_step(plan, state), state, batch).compile()(state, batch)
    )  # fmt: skip
    assert np.isfinite(metrics["loss"].total)


def test_what_was_not_used_for_longest_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_programs, "_MOST_FILES", 2)
    for index in range(4):
        kept_programs._write(tmp_path / f"{index}.step", b"[]", b"program")
        kept_programs.os.utime(tmp_path / f"{index}.step", (index, index))
    assert [path.name for path in sorted(tmp_path.glob("*"))] == ["2.step", "3.step"]


def test_several_devices_and_no_cache_keep_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "jaxtrain")
    monkeypatch.setattr(compilation_cache, "_in_use", None)
    assert kept_programs.keep_programs(make_plan()) is None and not caplog.messages
    monkeypatch.setattr(compilation_cache, "_in_use", str(tmp_path))
    two = sharding.ShardingPlan(sharding.make_mesh({"data": 2}, jax.devices()[:2]))
    assert kept_programs.keep_programs(two) is None
    offloads = sharding.ShardingPlan(make_plan().mesh, offload_optimizer=True)
    assert kept_programs.keep_programs(offloads) is None
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "it is for several devices",
        "its state is offloaded",
    ]
