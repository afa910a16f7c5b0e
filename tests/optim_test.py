"""Optimizers, decay mask and loss scaling, against PyTorch and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.optimizers.optim import (
    OPTIMIZERS,
    LossScale,
    decay_mask,
    init_loss_scale,
    make_optimizer,
    orthogonal_factor,
    state_shardings,
)
from jaxtrain.optimizers.schedules import make_schedule

LAYERS, WIDTH, INNER = 2, 8, 12


def make_params(seed=0):
    """A tree with every kind of leaf: table, stacked matrix, norm, bias, adapter."""
    draw = np.random.default_rng(seed).standard_normal

    def leaf(*shape):
        return jnp.asarray(draw(shape), jnp.float32)

    return {
        "embed_tokens": {"embedding": leaf(16, WIDTH)},
        "layers": {
            "input_layernorm": {"scale": leaf(LAYERS, WIDTH)},
            "self_attn": {
                "q_norm": {"scale": leaf(LAYERS, 4)},
                "q_proj": {
                    "kernel": leaf(LAYERS, WIDTH, INNER),
                    "bias": leaf(LAYERS, INNER),
                    "lora_a": leaf(LAYERS, WIDTH, 2),
                    "lora_b": leaf(LAYERS, 2, INNER),
                },
            },
        },
        "norm": {"scale": leaf(WIDTH)},
        "lm_head": {"kernel": leaf(WIDTH, 16)},
    }


def unstack(params):
    """Name -> one layer's array, as PyTorch would hold it."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(key.key for key in path)
        if name.startswith("layers."):
            for i, layer in enumerate(np.asarray(leaf)):
                flat[name.replace("layers.", f"layers.{i}.")] = layer
        else:
            flat[name] = np.asarray(leaf)
    return flat


def train(tx, params, steps, scale=1.0):
    """`steps` updates by gradients that depend on the step only."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        grads = jax.tree.map(lambda g: scale * g, make_params(seed=100 + step))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def train_with_torch(make, params, steps):
    """The same by a torch optimizer over unstacked arrays, decay as Trainer groups it.

    `make(torch, decayed, undecayed)` gets lists of tensors.
    """
    torch = pytest.importorskip("torch")
    mask = unstack(jax.tree.map(lambda m, p: np.full(p.shape, m), *masked(params)))
    tensors = {
        name: torch.nn.Parameter(torch.tensor(array.copy()))
        for name, array in unstack(params).items()
    }
    groups = ([], [])
    for name, tensor in tensors.items():
        groups[0 if mask[name].all() else 1].append(tensor)
    optimizer = make(torch, *groups)
    for step in range(steps):
        for name, grad in unstack(make_params(seed=100 + step)).items():
            tensors[name].grad = torch.tensor(grad.copy())
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def masked(params):
    return decay_mask(params), params


def assert_same(params, expected, *, rtol=1e-5, atol=1e-6):
    actual = unstack(params)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            actual[name], value, rtol=rtol, atol=atol, err_msg=name
        )


def constant(learning_rate):
    return make_schedule("constant", learning_rate=learning_rate, total_steps=100)


# --- parity ------------------------------------------------------------------------


@pytest.mark.torch
def test_adamw_equals_torch_over_20_steps():
    params = make_params()
    tx = make_optimizer(
        "adamw", constant(1e-2), weight_decay=0.1, beta2=0.95, epsilon=1e-6
    )

    def make(torch, decayed, undecayed):
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6)

    assert_same(train(tx, params, 20), train_with_torch(make, params, 20))


@pytest.mark.torch
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_sgd_equals_torch_over_20_steps(momentum):
    params = make_params()
    tx = make_optimizer("sgd", constant(1e-2), weight_decay=0.1, momentum=momentum)

    def make(torch, decayed, undecayed):
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=1e-2, momentum=momentum or 0.0)

    assert_same(train(tx, params, 20), train_with_torch(make, params, 20))


@pytest.mark.torch
def test_adafactor_equals_transformers_layer_by_layer():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    params = make_params()
    tx = make_optimizer("adafactor", constant(1e-2), weight_decay=0.1)

    def make(torch, decayed, undecayed):
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        return transformers.optimization.Adafactor(
            groups, lr=1e-2, scale_parameter=False, relative_step=False
        )

    assert_same(train(tx, params, 20), train_with_torch(make, params, 20), atol=1e-5)


@pytest.mark.torch
def test_muon_equals_torch_on_matrices_and_adamw_elsewhere():
    params = make_params()
    learning_rate = 1e-2
    tx = make_optimizer("muon", constant(learning_rate), weight_decay=0.1)

    class MuonAndAdamW:
        def __init__(self, torch, decayed, undecayed):
            # The tables are the two-dimensional leaves with a vocabulary of 16.
            tables = [p for p in decayed if 16 in p.shape]
            matrices = [p for p in decayed if 16 not in p.shape]
            self.parts = [
                # torch's parameters are [out, in]; both its rules are symmetric.
                torch.optim.Muon(
                    matrices,
                    lr=learning_rate,
                    weight_decay=0.1,
                    adjust_lr_fn="match_rms_adamw",
                ),
                torch.optim.AdamW(tables, lr=learning_rate, weight_decay=0.1),
                torch.optim.AdamW(undecayed, lr=learning_rate, weight_decay=0.0),
            ]

        def step(self):
            for part in self.parts:
                part.step()

    actual = unstack(train(tx, params, 5))
    expected = train_with_torch(MuonAndAdamW, params, 5)

    for name, value in expected.items():
        moved = np.abs(value - unstack(params)[name]).max()
        is_matrix = "q_proj.kernel" in name or "lora" in name
        # torch orthogonalizes in bfloat16, to about 1 % of every update.
        tolerance = 0.05 * moved if is_matrix else 1e-5
        np.testing.assert_allclose(actual[name], value, atol=tolerance, err_msg=name)


def test_lion_steps_by_the_sign_of_the_interpolated_momentum():
    grads = np.array([[1.0, -2.0, 0.5], [-3.0, 0.1, 0.5]])  # two steps
    p, m = np.array([1.0, 1.0, 1.0]), np.zeros(3)
    for g in grads:
        p = p - 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.01 * p)
        m = 0.99 * m + 0.01 * g
    tx = make_optimizer("lion", constant(0.1), weight_decay=0.01, beta2=0.99)
    params = {"dense": {"kernel": jnp.ones(3)}}
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({"dense": {"kernel": jnp.asarray(g)}}, state, params)
        params = optax.apply_updates(params, updates)

    np.testing.assert_allclose(params["dense"]["kernel"], p, rtol=1e-6)


def test_the_orthogonal_factor_keeps_singular_vectors_and_levels_values():
    for shape in [(3, 6, 10), (3, 10, 6), (7, 7)]:
        matrices = np.random.default_rng(1).standard_normal(shape)
        u, s, vt = np.linalg.svd(matrices, full_matrices=False)
        s = s / np.sqrt(np.square(s).sum(-1, keepdims=True))
        for _ in range(5):  # the polynomial acts on each singular value alone
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected = np.einsum("...ir,...r,...ro->...io", u, s, vt)

        actual = orthogonal_factor(jnp.asarray(matrices, jnp.float32))

        np.testing.assert_allclose(actual, expected, atol=1e-4)


# --- stacking and precision --------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_train_as_separate_matrices(name):
    stacked = make_params()["layers"]
    # The second layer's gradients are far larger: shared statistics would show.
    weights = jnp.array([1.0, 50.0])

    def weigh(tree):
        return jax.tree.map(
            lambda g: g * weights.reshape(-1, *[1] * (g.ndim - 1)), tree
        )

    def run(params, pick):
        tx = make_optimizer(name, constant(1e-2), weight_decay=0.1)
        state = tx.init(params)
        for step in range(3):
            grads = pick({"layers": weigh(make_params(seed=step)["layers"])})
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    together = run({"layers": stacked}, lambda grads: grads)
    for i in range(LAYERS):

        def pick(tree, i=i):
            return jax.tree.map(lambda x: x[i : i + 1], tree)

        alone = run(pick({"layers": stacked}), pick)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            pick(together),
            alone,
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_float32_even_for_bfloat16_parameters(name):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    tx = make_optimizer(name, constant(1e-2), momentum=_momentum(name))
    updates, state = tx.update(params, tx.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]

    assert all(x.dtype == jnp.float32 for x in moments)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))


def _momentum(name):
    return 0.9 if name in ("sgd", "muon") else None


def test_adafactor_holds_far_less_than_one_copy_of_the_matrices():
    params = {"layers": {"mlp": {"kernel": jnp.zeros((3, 64, 128))}}}
    state = jax.eval_shape(make_optimizer("adafactor", constant(1)).init, params)

    held = sum(leaf.size for leaf in jax.tree.leaves(state))

    assert held == 3 * (64 + 128) + 2  # and two step counts


def test_the_learning_rate_follows_the_schedule():
    schedule = make_schedule("linear", learning_rate=1.0, total_steps=4, warmup_steps=2)
    tx = make_optimizer("sgd", schedule)
    params = {"a": {"kernel": jnp.zeros(1)}}
    state, steps = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update({"a": {"kernel": jnp.ones(1)}}, state, params)
        steps.append(float(updates["a"]["kernel"][0]))

    assert steps == pytest.approx([0.0, -0.5, -1.0, -0.5])


# --- the decay mask ----------------------------------------------------------------


def test_norms_and_biases_are_not_decayed():
    mask = decay_mask(make_params())

    undecayed = sorted(
        ".".join(key.key for key in path)
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
        if not decays
    )
    assert undecayed == [
        "layers.input_layernorm.scale",
        "layers.self_attn.q_norm.scale",
        "layers.self_attn.q_proj.bias",
        "norm.scale",
    ]


@pytest.mark.torch
def test_the_mask_is_that_of_trainer_with_and_without_peft():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attention_bias=True,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    leaf_names = {"weight": "kernel", "lora_A": "lora_a", "lora_B": "lora_b"}
    for module in (model, peft.get_peft_model(model, lora)):
        decayed = set(transformers.Trainer.get_decay_parameter_names(None, module))
        for name, _ in module.named_parameters():
            parts = [
                leaf_names.get(part, part)
                for part in name.removeprefix("base_model.model.").split(".")
                if part not in ("model", "0", "default", "base_layer")
            ]
            if "lora_a" in parts or "lora_b" in parts:
                parts = parts[:-1]
            ours = {}
            node = ours
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = 0.0
            assert jax.tree.leaves(decay_mask(ours)) == [name in decayed], name


# --- shardings ---------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_laid_out_as_its_parameters(name):
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    replicated = NamedSharding(mesh, PartitionSpec())

    def spec(leaf):
        if leaf.ndim == 3:
            return PartitionSpec(None, "fsdp", "tensor")
        return PartitionSpec(None, "fsdp") if leaf.ndim == 2 else PartitionSpec()

    params = {
        "layers": {
            "mlp": {"kernel": jnp.ones((LAYERS, WIDTH, WIDTH))},  # square on purpose
            "input_layernorm": {"scale": jnp.ones((LAYERS, WIDTH))},
        },
        "lm_head": {"kernel": jnp.ones((WIDTH, 16))},
    }
    param_shardings = jax.tree.map(lambda p: NamedSharding(mesh, spec(p)), params)
    tx = make_optimizer(name, constant(1e-2), momentum=_momentum(name))

    shardings = state_shardings(tx, params, param_shardings, replicated)

    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    layouts = {
        (leaf.shape, tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(state)
    }
    if name == "adafactor":
        assert ((LAYERS, WIDTH), (None, "fsdp")) in layouts  # rows: less the last axis
        assert ((LAYERS, WIDTH), (None, "tensor")) in layouts  # columns
        assert ((WIDTH,), ()) in layouts or ((WIDTH,), (None,)) in layouts
        assert ((16,), ("fsdp",)) in layouts
    else:
        assert ((LAYERS, WIDTH, WIDTH), (None, "fsdp", "tensor")) in layouts
        assert ((LAYERS, WIDTH), (None, "fsdp")) in layouts
        assert ((WIDTH, 16), (None, "fsdp")) in layouts
    assert ((), ()) in layouts  # the step count

    # And a sharded update equals the unsharded one.
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    expected, _ = tx.update(grads, tx.init(params), params)
    actual, _ = jax.jit(tx.update)(
        jax.device_put(grads, param_shardings),
        state,
        jax.device_put(params, param_shardings),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        actual,
        expected,
    )


# --- loss scaling ------------------------------------------------------------------


def test_the_loss_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    start = init_loss_scale()
    assert (float(start.scale), int(start.good_steps)) == (65536.0, 0)

    backed_off = start.update(jnp.bool_(False))
    assert (float(backed_off.scale), int(backed_off.good_steps)) == (32768.0, 0)

    almost = LossScale(jnp.float32(8.0), jnp.int32(1999))
    grown = almost.update(jnp.bool_(True))
    assert (float(grown.scale), int(grown.good_steps)) == (16.0, 0)
    reset = almost.update(jnp.bool_(False))
    assert (float(reset.scale), int(reset.good_steps)) == (4.0, 0)


def test_the_loss_scale_never_grows_to_infinity():
    scale = LossScale(jnp.float32(2.0**127), jnp.int32(1999))

    assert float(scale.update(jnp.bool_(True)).scale) == 2.0**127


@pytest.mark.torch
def test_the_loss_scale_follows_torch_grad_scaler():
    torch = pytest.importorskip("torch")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = LossScale(jnp.float32(64.0), jnp.int32(0), growth_interval=3)
    update = jax.jit(LossScale.update)
    for finite in [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]:
        loss = scaler.scale((parameter * (1.0 if finite else float("inf"))).sum())
        optimizer.zero_grad()
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
        ours = update(ours, jnp.bool_(finite))

        assert float(ours.scale) == scaler.get_scale()
        assert int(ours.good_steps) == scaler._get_growth_tracker()


# --- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {}, "optimizer = 'adam' is unknown.*adamw"),
        ("adamw", {"momentum": 0.9}, "momentum = 0.9.*adamw"),
    ],
)
def test_a_wrong_optimizer_is_refused_with_its_fix(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, constant(1.0), **options)
