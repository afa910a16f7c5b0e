"""Losses, metrics and gradients against TRL, run live on tiny torch models.

One `trl.DPOTrainer` is built for the whole file; its loss attributes are set per test.
Our closures get log-probs that numpy computes from the same models' logits, so what is
compared is everything from log-probs on. Each comparison is on batches whose pairs
differ in length.
"""

import copy
import functools
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.objectives import make_objective
from jaxtrain.objectives.kto import LabeledBatch
from jaxtrain.types import Batch, PairBatch, TokenLogProbs

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.torch

VOCABULARY = 128
TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
    "sigmoid_norm",
)  # fmt: skip
TRL_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
)
DEFAULTS = {
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
}


# --- the torch side ---------------------------------------------------------------


def tiny_model(seed: int) -> Any:
    """A random Llama whose logits are wide enough that policies differ clearly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.12,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def moved_model(model: Any, distance: float) -> Any:
    """A copy some way off, so that log-ratios are a few nats, as in training."""
    copied = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += distance * parameter.std() * torch.randn_like(parameter)
    return copied


def word_tokenizer() -> Any:
    """One word, one token: the text of a row fixes its lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    )


def preference_rows(seed: int, count: int) -> list[dict[str, str]]:
    draw = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        ids = draw.integers(3, VOCABULARY, draw.integers(low, high))
        return " ".join(f"w{i}" for i in ids)

    return [
        {
            "prompt": words(2, 8),
            "chosen": " " + words(1, 14),
            "rejected": " " + words(1, 14),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_weighting=True,  # makes its head compute what WPO needs
        pad_to_multiple_of=None,
    )
    model = tiny_model(0)
    return DPOTrainer(
        model=model,
        ref_model=moved_model(model, 0.3),
        args=args,
        train_dataset=Dataset.from_list(preference_rows(0, 7)),
        processing_class=word_tokenizer(),
    )


@pytest.fixture(scope="session")
def inputs(trainer: Any) -> dict[str, Any]:
    """Six pairs as TRL collates them."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(6)])


@pytest.fixture(scope="session")
def one_pair(trainer: Any) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[6]])


def run_trl(
    trainer: Any, inputs: dict[str, Any], model: Any = None, **settings: Any
) -> tuple[Any, dict[str, float]]:
    """TRL's loss and metrics on `inputs` under `settings`, defaults for the others."""
    for key, value in (DEFAULTS | settings).items():
        setattr(trainer, key, value)
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = trainer._compute_loss(model or trainer.model, inputs, False)
    return loss, {key: v[-1] for key, v in trainer._metrics["train"].items()}


# --- our side ---------------------------------------------------------------------


@functools.cache
def score_with_numpy(model: Any, ids: Any, attention: Any) -> TokenLogProbs:
    """What a policy closure returns, from a torch model's logits, in float64."""
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits
    logits = logits.double().numpy()
    targets = shift(ids.numpy())
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    probs = np.exp(log_probs)
    return TokenLogProbs(
        logps=np.float32(np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]),
        entropy=np.float32(-(probs * log_probs).sum(-1)),
        correct=np.float32(logits.argmax(-1) == targets),
        mean_logit=np.float32(logits.mean(-1)),
        collision=np.float32(np.log((probs**2).sum(-1))),
    )


def shift(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], axis=1)


def as_batch(ids: Any, attention: Any, completion: Any) -> Batch:
    ids, attention = ids.numpy(), attention.numpy()
    return Batch(
        tokens=ids.astype(np.int32),
        targets=shift(ids).astype(np.int32),
        segment_ids=attention.astype(np.int32),
        positions=np.cumsum(attention, -1).astype(np.int32) - 1,
        loss_mask=shift(completion.numpy()).astype(np.float32),
    )


def as_pairs(inputs: dict[str, Any]) -> PairBatch:
    keys = ("input_ids", "attention_mask", "completion_mask")
    halves = [torch.chunk(inputs[key], 2) for key in keys]
    chosen, rejected = (as_batch(*(half[i] for half in halves)) for i in (0, 1))
    return PairBatch(chosen, rejected)


def closure(scored: TokenLogProbs, batch: Batch) -> Callable[[Batch], TokenLogProbs]:
    """A LogProbsFn that knows `batch`'s rows: finds each asked row by its tokens."""

    def score(asked: Batch) -> TokenLogProbs:
        rows = (asked.tokens[:, None] == batch.tokens[None]).all(-1).argmax(1)
        return jax.tree.map(lambda x: jnp.asarray(x)[rows], scored)

    return score


def joined(pairs: PairBatch) -> Batch:
    return jax.tree.map(
        lambda c, r: np.concatenate([c, r]), pairs.chosen, pairs.rejected
    )


def run_ours(
    trainer: Any, inputs: dict[str, Any], name: str = "preference", **settings: Any
) -> tuple[float, dict[str, float]]:
    pairs = as_pairs(inputs)
    policy, reference = (
        closure(
            score_with_numpy(model, inputs["input_ids"], inputs["attention_mask"]),
            joined(pairs),
        )
        for model in (trainer.model, trainer.ref_model)
    )
    loss, metrics = make_objective(name, **settings)(policy, reference, pairs)
    means = {key: float(value.mean()) for key, value in metrics.items()}
    return float(loss.mean()), means


def assert_same(ours: float, theirs: float, what: str) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6, err_msg=what)


def compare(trainer: Any, inputs: dict[str, Any], **settings: Any) -> None:
    """Loss and every metric, with the settings under TRL's names on both sides."""
    names = settings.pop("loss_type", "sigmoid")
    listed = [names] if isinstance(names, str) else names
    weights = settings.pop("loss_weights", None)
    trl_loss, trl_metrics = run_trl(
        trainer,
        inputs,
        loss_types=listed,
        loss_weights=weights or [1.0] * len(listed),
        **settings,
    )
    loss, metrics = run_ours(
        trainer, inputs, loss_type=names, loss_weights=weights, **settings
    )
    assert_same(loss, float(trl_loss), "loss")
    for key in TRL_METRICS:
        assert_same(metrics[key], trl_metrics[key], key)
    assert metrics["num_tokens"] == int(inputs["attention_mask"].sum())


def smoothing_of(loss_type: str) -> dict[str, float]:
    smoothed = ("robust", "exo_pair", "aot", "aot_unpaired")
    return {"label_smoothing": 0.15} if loss_type in smoothed else {}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_loss_and_metrics_equal_trl(
    trainer: Any, inputs: dict[str, Any], loss_type: str, beta: float
) -> None:
    compare(trainer, inputs, loss_type=loss_type, beta=beta, **smoothing_of(loss_type))


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_a_batch_of_one_pair_equals_trl(
    trainer: Any, one_pair: dict[str, Any], loss_type: str
) -> None:
    compare(trainer, one_pair, loss_type=loss_type, **smoothing_of(loss_type))


@pytest.mark.parametrize("loss_type", ["robust", "aot", "aot_unpaired"])
def test_losses_without_label_smoothing_equal_trl(
    trainer: Any, inputs: dict[str, Any], loss_type: str
) -> None:
    compare(trainer, inputs, loss_type=loss_type)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "exo_pair"])
@pytest.mark.parametrize(
    ("kind", "alpha"),
    [
        ("forward_kl", 0.5),
        ("js_divergence", 0.5),
        ("alpha_divergence", 0.5),
        ("alpha_divergence", 1.0),
        ("alpha_divergence", 1.5),
    ],
)
def test_f_divergences_equal_trl(
    trainer: Any, inputs: dict[str, Any], loss_type: str, kind: str, alpha: float
) -> None:
    compare(
        trainer,
        inputs,
        loss_type=loss_type,
        f_divergence_type=kind,
        f_alpha_divergence_coef=alpha,
        **smoothing_of(loss_type),
    )


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "aot", "sft"])
def test_length_desensitized_losses_equal_trl(
    trainer: Any, inputs: dict[str, Any], loss_type: str, ld_alpha: float
) -> None:
    compare(trainer, inputs, loss_type=loss_type, ld_alpha=ld_alpha)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "apo_zero"])
def test_wpo_weighting_equals_trl(
    trainer: Any, inputs: dict[str, Any], loss_type: str
) -> None:
    compare(trainer, inputs, loss_type=loss_type, use_weighting=True)


def test_weighted_lists_of_losses_equal_trl_and_report_their_parts(
    trainer: Any, inputs: dict[str, Any]
) -> None:
    names, weights = ["sigmoid", "sft", "aot"], [0.7, 1.3, 0.2]
    compare(trainer, inputs, loss_type=names, loss_weights=weights)
    compare(trainer, inputs, loss_type=names)
    _, metrics = run_ours(trainer, inputs, loss_type=names, loss_weights=weights)
    for name in names:
        alone, _ = run_trl(trainer, inputs, loss_types=[name])
        assert_same(metrics[f"loss/{name}"], float(alone), name)


def test_precomputed_reference_log_probs_equal_trl(
    trainer: Any, inputs: dict[str, Any]
) -> None:
    trainer.ld_alpha = None
    sums = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    keys = ("ref_chosen_logps", "ref_rejected_logps")
    with_sums = inputs | dict(zip(keys, sums, strict=True))
    trainer.precompute_ref_logps = True
    try:
        trl_loss, trl_metrics = run_trl(trainer, with_sums)
    finally:
        trainer.precompute_ref_logps = False
    pairs = as_pairs(inputs)
    pairs = PairBatch(pairs.chosen, pairs.rejected, *(s.numpy() for s in sums))
    policy = closure(
        score_with_numpy(trainer.model, inputs["input_ids"], inputs["attention_mask"]),
        joined(pairs),
    )
    objective = make_objective("preference", precompute_ref_log_probs=True)
    loss, metrics = objective(policy, None, pairs)
    assert_same(float(loss.mean()), float(trl_loss), "loss")
    for key in TRL_METRICS:
        assert_same(float(metrics[key].mean()), trl_metrics[key], key)


# --- gradients --------------------------------------------------------------------


class RecordedModel:
    """Stands for the policy in TRL's loss: its log-probs are a leaf of the graph."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.log_probs: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        output = self.model(**kwargs)
        self.log_probs = output.log_probs.detach().requires_grad_(True)
        output.log_probs = self.log_probs
        return output


@pytest.mark.parametrize(("use_weighting", "ld_alpha"), [(False, None), (True, 0.4)])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_gradients_of_token_log_probs_equal_torch(
    trainer: Any,
    inputs: dict[str, Any],
    loss_type: str,
    use_weighting: bool,
    ld_alpha: float | None,
) -> None:
    if use_weighting and loss_type in ("aot", "aot_unpaired", "sft", "hinge"):
        # TRL refuses the first two; its in-place product breaks autograd on the others.
        pytest.skip("TRL has no weighted form of this loss with a gradient")
    settings = smoothing_of(loss_type) | {
        "use_weighting": use_weighting,
        "ld_alpha": ld_alpha,
    }
    recorded = RecordedModel(trainer.model)
    trl_loss, _ = run_trl(
        trainer, inputs, model=recorded, loss_types=[loss_type], **settings
    )
    (expected,) = torch.autograd.grad(trl_loss, recorded.log_probs)

    pairs = as_pairs(inputs)
    everything = joined(pairs)
    scored, ref_scored = (
        score_with_numpy(model, inputs["input_ids"], inputs["attention_mask"])
        for model in (trainer.model, trainer.ref_model)
    )
    objective = make_objective("preference", loss_type=loss_type, **settings)

    def mean_loss(logps: jax.Array) -> jax.Array:
        leaf = TokenLogProbs(
            logps,
            scored.entropy,
            scored.correct,
            scored.mean_logit,
            scored.collision,
        )
        policy = closure(leaf, everything)
        return objective(policy, closure(ref_scored, everything), pairs)[0].mean()

    # Eager: a hundred small programs compile slower than they run op by op.
    gradient = np.asarray(jax.grad(mean_loss)(jnp.asarray(scored.logps)))
    assert np.abs(gradient).max() > 0 or loss_type == "hinge"
    # Outside the completions TRL's head returns constants, whose gradient goes nowhere.
    expected = expected.numpy() * everything.loss_mask[:, :-1]
    np.testing.assert_allclose(gradient[:, :-1], expected, rtol=1e-4, atol=1e-7)
    assert not gradient[:, -1].any()


# --- ORPO, CPO, SimPO, KTO --------------------------------------------------------


def bare_trainer(kind: type, **attributes: Any) -> Any:
    """A TRL trainer without its training machinery: only its loss methods run."""
    trainer = kind.__new__(kind)
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
    )
    shared = {"accelerator": accelerator, "aux_loss_enabled": False}
    for key, value in (shared | attributes).items():
        setattr(trainer, key, value)
    return trainer


def without_reference_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same rows in the form that TRL's ORPO and CPO trainers collate."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    columns = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "labels": labels,
    }
    return {
        f"{side}_{key}": torch.chunk(value, 2)[i]
        for key, value in columns.items()
        for i, side in enumerate(("chosen", "rejected"))
    }


# Their logits/* average every position, padding included; ours, as DPO's, completions.
SHARED_METRICS = [
    key for key in TRL_METRICS if key.split("/")[0] in ("rewards", "logps")
]


def test_orpo_equals_trl(trainer: Any, inputs: dict[str, Any]) -> None:
    from trl.experimental.orpo import ORPOTrainer

    theirs = bare_trainer(
        ORPOTrainer, beta=0.3, is_encoder_decoder=False, padding_value=0
    )
    with torch.no_grad():
        trl_loss, trl_metrics = theirs.get_batch_loss_metrics(
            trainer.model, without_reference_inputs(inputs)
        )
    loss, metrics = run_ours(trainer, inputs, "orpo", beta=0.3)
    assert_same(loss, float(trl_loss), "loss")
    for key in [*SHARED_METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen"]:
        assert_same(metrics[key], trl_metrics[key], key)


@pytest.mark.parametrize("alpha", [0.0, 0.02])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_and_simpo_equal_trl(
    trainer: Any, inputs: dict[str, Any], loss_type: str, alpha: float
) -> None:
    from trl.experimental.cpo import CPOTrainer

    smoothing = 0.1 if loss_type in ("sigmoid", "simpo") else 0.0
    settings = {"beta": 0.4, "label_smoothing": smoothing, "simpo_gamma": 0.7}
    settings |= {"cpo_alpha": 0.6, "alpha": alpha}
    theirs = bare_trainer(
        CPOTrainer,
        loss_type=loss_type,
        is_encoder_decoder=False,
        pad_token_id=0,
        **settings,
    )
    with torch.no_grad():
        trl_loss, trl_metrics = theirs.get_batch_loss_metrics(
            trainer.model, without_reference_inputs(inputs)
        )
    results = [run_ours(trainer, inputs, "cpo", loss_type=loss_type, **settings)]
    if loss_type == "simpo":
        results.append(run_ours(trainer, inputs, "simpo", **settings))
    for loss, metrics in results:
        assert_same(loss, float(trl_loss), "loss")
        for key in [*SHARED_METRICS, "nll_loss"]:
            assert_same(metrics[key], trl_metrics[key], key)


@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0], [1] * 6, [0] * 6], ids=str)
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl(trainer: Any, loss_type: str, labels: list[int]) -> None:
    from trl import KTOTrainer
    from trl.trainer.utils import add_fused_lm_head

    # TRL gives the reference's head no statistics; here it is the policy once, too.
    stats = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(trainer.ref_model, outputs=stats)
    rows = [trainer.train_dataset[i] for i in range(6)]
    pairs = trainer.data_collator(rows)
    keys = ("input_ids", "attention_mask", "completion_mask")
    # The policy and the reference change places so that z is positive in one of two.
    batch = {key: torch.chunk(pairs[key], 2)[0] for key in keys}
    batch |= {f"KL_{key}": torch.chunk(pairs[key], 2)[1] for key in keys}
    batch["label"] = torch.tensor(labels, dtype=torch.bool)
    ours = LabeledBatch(
        completions=as_batch(*(batch[key] for key in keys)),
        desirable=np.float32(labels),
        mismatched=as_batch(*(batch[f"KL_{key}"] for key in keys)),
    )
    everything = jax.tree.map(
        lambda a, b: np.concatenate([a, b]), ours.completions, ours.mismatched
    )
    weights = {"desirable_weight": 1.4, "undesirable_weight": 0.8}
    seen_positive = False
    for policy, reference in [
        (trainer.model, trainer.ref_model),
        (trainer.ref_model, trainer.model),
    ]:
        theirs = bare_trainer(
            KTOTrainer,
            model=policy,
            ref_model=reference,
            calculate_KL=loss_type == "kto",
            loss_type=loss_type,
            beta=0.1,
            precompute_ref_logps=False,
            args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
            _total_train_tokens=0,
            _tp_size=1,
            _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
            **weights,
        )
        policy.train()
        with torch.no_grad():
            trl_loss = theirs._compute_loss(policy, batch, False)
        trl_metrics = {k: v[-1] for k, v in theirs._metrics["train"].items()}
        score, ref_score = (
            closure(
                score_with_numpy(model, pairs["input_ids"], pairs["attention_mask"]),
                everything,
            )
            for model in (policy, reference)
        )
        objective = make_objective("kto", loss_type=loss_type, **weights)
        loss, metrics = objective(score, ref_score, ours)
        assert_same(float(loss.mean()), float(trl_loss), "loss")
        for key, value in trl_metrics.items():
            assert_same(float(metrics[key].mean()), value, key)
        seen_positive |= float(metrics["kl"].mean()) > 0
    assert seen_positive == (loss_type == "kto")
