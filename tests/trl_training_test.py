"""Whole trainings against TRL's, live: every logged number and the final weights.

Both start from one directory and, under LoRA, from the adapter that TRL made. There are
17 rows in micro-batches of 3, 4 to a step: each epoch's second step has two micro-
batches, the last of 2 rows. Everything is float32 without dropout.
"""

import importlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy

from jaxtrain.config import default_config
from jaxtrain.trainer import TrainingOrchestrator

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

ROWS, EVAL_ROWS, STEPS = 17, 12, 20
FAMILIES = ("llama", "qwen2")
METHODS = ("sft", "lora-sft", "dpo", "lora-dpo", "kto", "orpo", "cpo")
# By the names that the two trainers share. What else they log are clocks and, of ours,
# what TRL does not have.
SFT_METRICS = (
    "loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy",
    "num_tokens", "epoch",
)  # fmt: skip
DPO_METRICS = (
    *SFT_METRICS, "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected", "logits/chosen",
    "logits/rejected",
)  # fmt: skip
METRICS = {
    "sft": SFT_METRICS,
    "dpo": DPO_METRICS,
    "kto": (
        *sorted({*DPO_METRICS} - {"mean_token_accuracy", "rewards/accuracies"}),
        "kl",
    ),
}
# Of a last, shorter micro-batch TRL's trainers of these log other means than their own
# loss has; their logits count prompts.
METRICS["orpo"] = METRICS["cpo"] = ("loss", "grad_norm", "learning_rate", "epoch")
NOT_EVALUATED = ("grad_norm", "learning_rate", "num_tokens", "epoch")


def byte_tokenizer() -> Any:
    """One byte, one token: the text of a row fixes its lengths."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "</s>", *alphabet]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    )


def make_rows(objective: str, count: int = ROWS, seed: int = 0) -> list[dict[str, str]]:
    """Rows of many lengths, some cut at max_length."""
    draw = np.random.default_rng(seed)

    def letters(low: int, high: int) -> str:
        return "".join(chr(i) for i in draw.integers(97, 123, draw.integers(low, high)))

    has_pairs = objective in ("dpo", "orpo", "cpo")
    sides = ("chosen", "rejected") if has_pairs else ("completion",)
    rows: list[dict[str, Any]] = [
        {"prompt": letters(2, 8), **{side: letters(1, 18) for side in sides}}
        for _ in range(count)
    ]
    if objective == "kto":
        rows = [row | {"label": bool(i % 3)} for i, row in enumerate(rows)]
    return rows


# The router's loss shows in the fourth digit of the loss by its usual 0.001.
MIXTURE = {
    "num_experts_per_tok": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.2,
}  # fmt: skip

GPT_OSS = {"head_dim": 16, "sliding_window": 8, "swiglu_limit": 0.7}


# What some families have beside sizes, so that it matters.
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTURE,
    "gpt_oss": MIXTURE | GPT_OSS,
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
        "attention_multiplier": 0.3, "logits_scaling": 2.5,
    },
    "cohere2": {**WINDOWS, "logit_scale": 0.6},
    "olmo3": WINDOWS,
    "smollm3": {"no_rope_layer_interval": 2},
    # A bias of keys has no gradient where they do not turn, and Adam makes whole steps
    # of what rounding leaves there.
    "glm4": {"head_dim": 16, "attention_bias": False},
    "ministral3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
}  # fmt: skip


# Families whose layers are of several kinds.
OF_KINDS = {
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "qwen3_5_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        # What a head reads may be tiny: dividing by its size magnifies rounding.
        "rms_norm_eps": 1e-2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "head_dim": 16,
        "global_head_dim": 24,
        "sliding_window": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 272,
    },
}
GROUPED = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
}
SHARED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "router_aux_loss_coef": 0.2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MIXTURES = {
    "glm4_moe": GROUPED | {"head_dim": 16, "use_qk_norm": True},
    "deepseek_v3": GROUPED | LATENT | {"n_group": 1},
    "deepseek_v2": GROUPED
    | LATENT
    | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "qwen2_moe": SHARED,
    "qwen3_5_moe_text": OF_KINDS["qwen3_5_text"] | SHARED,
    "qwen3_next": OF_KINDS["qwen3_5_text"] | SHARED,
    "gemma4_experts": OF_KINDS["gemma4_text"]
    | {
        "model_type": "gemma4_text",
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
}


@pytest.fixture(scope="session", params=FAMILIES)
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a tiny random model, its logits wide, and its tokenizer."""
    import transformers

    torch.set_num_threads(1)  # more cost tiny matrices more than they bring
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.12,
        "tie_word_embeddings": request.param == "qwen2" or request.param in OF_KINDS,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **OPTIONS.get(request.param, {}),
        **OF_KINDS.get(request.param, {}),
        **MIXTURES.get(request.param, {}),
    }
    model_type = sizes.pop("model_type", request.param)
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    path = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": EVAL_ROWS,
    "gradient_accumulation_steps": 4,
    "max_steps": STEPS,
    "logging_steps": 1,
}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# Adapters start at zero; after small steps, rewards would be log-probs' rounding.
LORA_SETTINGS = SETTINGS | {"learning_rate": 1e-2}
MAX_LENGTH = 20


class Trained(NamedTuple):
    """A trainer's logs, final tensors by PyTorch's names, and last evaluation."""

    logs: list[dict[str, float]]
    weights: dict[str, np.ndarray]
    evaluated: dict[str, float]


def train_with_trl(
    method: str, base: Any, out: pathlib.Path, *, use_dora: bool = False, **options: Any
) -> Trained:
    """Train a directory's model, or a PEFT model as it is.

    Under LoRA, the adapter before the first step goes to `out/start`.
    """
    from datasets import Dataset

    objective = method.removeprefix("lora-")
    package: Any = trl
    if objective in ("orpo", "cpo"):
        package = importlib.import_module(f"trl.experimental.{objective}")
    config_class, trainer_class = (
        getattr(package, f"{objective.upper()}{name}") for name in ("Config", "Trainer")
    )
    with_lora = method.startswith("lora-")
    settings = LORA_SETTINGS if with_lora else SETTINGS
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=use_dora, **LORA)
    eval_rows = make_rows(objective, EVAL_ROWS, seed=1)
    trainer = trainer_class(
        model=str(base) if isinstance(base, pathlib.Path) else base,
        args=config_class(
            **settings | options,
            output_dir=str(out),
            max_length=MAX_LENGTH,
            train_sampling_strategy="sequential",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(make_rows(objective)),
        eval_dataset=Dataset.from_list(eval_rows),
        processing_class=byte_tokenizer(),
        peft_config=adapter if with_lora and isinstance(base, pathlib.Path) else None,
    )
    if with_lora:
        trainer.model.save_pretrained(out / "start")
    trainer.train()
    trainer.model.save_pretrained(out / "end")
    name = "adapter_model" if with_lora else "model"
    return Trained(
        [log for log in trainer.state.log_history if "loss" in log],
        safetensors.numpy.load_file(out / "end" / f"{name}.safetensors"),
        trainer.evaluate(),
    )


def train_with_jaxtrain(
    method: str, base: pathlib.Path, start: pathlib.Path, out: pathlib.Path,
    **options: Any,
) -> Trained:  # fmt: skip
    objective = method.removeprefix("lora-")
    config = default_config()
    config.model.name_or_path = str(base)
    config.data.shuffle = False
    config.data.max_length = MAX_LENGTH
    with_lora = method.startswith("lora-")
    settings = LORA_SETTINGS if with_lora else SETTINGS
    training = config.training
    training.training_type = objective
    if objective in ("kto", "orpo", "cpo"):
        training.training_type, training.objective = "dpo", objective
    for name, value in (settings | options).items():
        (training if name in training else training.dpo)[name] = value
    training.num_gpus = 1
    training.bf16 = False
    training.save_steps = 0
    training.eval_steps = training.max_steps
    training.report_to = ("jsonl",)
    if with_lora:
        training.lora.enabled = True
        training.lora.init_from = str(start)
    trainer = TrainingOrchestrator(config, workdir=out)
    trainer.prepare()
    trainer.train(make_rows(objective), make_rows(objective, EVAL_ROWS, seed=1))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    file = "model/model.safetensors"
    if with_lora:
        file = "adapter/adapter_model.safetensors"
    return Trained(
        [record for record in records if "loss" in record],
        safetensors.numpy.load_file(out / file),
        next(record for record in records if "eval_loss" in record),
    )


def assert_equal_trainings(
    ours: Trained,
    theirs: Trained,
    objective: str,
    *,
    tied_logs: int = 0,
    rounding: float = 0,
    margin_rounding: float | None = None,
    eval_rounding: float = 0,
) -> None:
    """Every metric of every log, the final weights and the evaluation.

    tied_logs: the first so many hold steps in which policy and reference are one
        model with adapters that act. Margins are 0 there but for rounding, and the
        sign of that is no accuracy.
    rounding: of rewards, which are 0 in such steps; `margin_rounding`: of their
        differences, the same unless given.
    eval_rounding: of the evaluation's rewards, which may be nearly 0.
    """
    names = METRICS[objective]
    for name in names:
        first = tied_logs if name == "rewards/accuracies" else 0
        found, expected = (
            [log[name] for log in run.logs[first:]] for run in (ours, theirs)
        )
        is_margin = name == "rewards/margins" and margin_rounding is not None
        assert_equal(name, found, expected, margin_rounding if is_margin else rounding)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, tensor in theirs.weights.items():
        np.testing.assert_allclose(
            ours.weights[name], tensor, atol=1e-4, rtol=0, err_msg=name
        )
    # In one batch. Of several, TRL takes the mean of means; we, that of all rows.
    for name in set(names) - set(NOT_EVALUATED):
        key = f"eval_{name}"
        sums = 2 if name == "rewards/margins" else 1
        assert_equal(
            name, ours.evaluated[key], theirs.evaluated[key], sums * eval_rounding
        )


def assert_equal(name: str, ours: Any, theirs: Any, rounding: float = 0) -> None:
    np.testing.assert_allclose(
        np.asarray(ours, float),
        np.asarray(theirs, float),
        rtol=1e-4,
        # Means of logits of either sign and size 1: they may cancel to nearly 0.
        atol=1e-6
        if name.startswith("logits/")
        else rounding * name.startswith("rewards/"),
        err_msg=name,
    )


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_log_and_learn_what_trl_does(
    method: str, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    theirs = train_with_trl(method, base, tmp_path / "trl")
    ours = train_with_jaxtrain(
        method, base, tmp_path / "trl" / "start", tmp_path / "ours"
    )
    assert len(ours.logs) == len(theirs.logs) == STEPS
    assert_equal_trainings(ours, theirs, method.removeprefix("lora-"))


def on_request(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.on_request)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("mixtral", "sft"),
        ("mixtral", "lora-dpo"),
        on_request("gpt_oss", "sft"),
        on_request("gpt_oss", "lora-dpo"),
        on_request("qwen2_moe", "sft"),
        on_request("qwen3_5_moe_text", "sft"),
        on_request("qwen3_next", "sft"),
    ],
    indirect=["base"],
)
def test_a_mixture_of_experts_logs_and_learns_what_trl_does(
    method: str, base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    """By all-linear, which of Mixtral means the router and the experts too."""
    options: dict[str, Any] = {"max_steps": 4}
    if method == "sft":  # TRL weighs micro-batches alike in the router's loss, we not
        options |= {"gradient_accumulation_steps": 1}
    if "gpt_oss" in str(base):  # whose experts PEFT adapts only by their names
        parameters = ["experts.gate_up_proj", "experts.down_proj", "router.weight"]
        monkeypatch.setitem(LORA, "target_parameters", parameters)
    theirs = train_with_trl(method, base, tmp_path / "trl", **options)
    ours = train_with_jaxtrain(
        method, base, tmp_path / "trl" / "start", tmp_path / "ours", **options
    )
    assert_equal_trainings(ours, theirs, method.removeprefix("lora-"))
    for logs in zip(ours.logs, theirs.logs, strict=True):
        assert_equal("aux_loss", *(log["aux_loss"] for log in logs))


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("granite", "dpo"),
        ("gemma4_text", "lora-dpo"),
        on_request("granite", "sft"),
        on_request("lfm2", "lora-dpo"),
        *(
            on_request(name, method)
            for name in (
                "glm4",
                "cohere2",
                "olmo3",
                "smollm3",
                "ministral3",
                "gemma",
                "lfm2",
                "gemma4_text",
                "qwen3_5_text",
                "glm4_moe",
                "deepseek_v3",
                "deepseek_v2",
            )
            for method in ("sft", "dpo")
        ),
        on_request("gemma4_experts", "sft"),
        on_request("gemma4_experts", "dpo"),
        on_request("qwen2_moe", "dpo"),
        on_request("qwen3_5_moe_text", "dpo"),
        on_request("qwen3_next", "dpo"),
    ],
    indirect=["base"],
)
def test_other_families_log_and_learn_what_trl_does(
    method: str, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options: dict[str, Any] = {"max_steps": 4}
    theirs = train_with_trl(method, base, tmp_path / "trl", **options)
    ours = train_with_jaxtrain(
        method, base, tmp_path / "trl" / "start", tmp_path / "ours", **options
    )
    assert len(ours.logs) == len(theirs.logs) == 4
    # The rate is 0 in the first of three steps of warming up, so that in two the policy
    # is the reference, whose factors XLA may fuse otherwise.
    method = method.removeprefix("lora-")
    ulp = reward_rounding(theirs) if method == "dpo" else 0
    varies = base.name.startswith((*MIXTURES, "qwen3_5_text"))
    assert_equal_trainings(
        ours,
        theirs,
        method,
        tied_logs=2,
        rounding=ulp if varies else 1e-7,
        margin_rounding=2 * ulp if varies else 1e-7,
        # A ten-thousandth of OLMo 3's -0.0027 is less than what rounding leaves.
        eval_rounding=ulp if base.name.startswith("olmo3") else 0,
    )


def reward_rounding(run: Trained) -> float:
    """How far a reward may be from what it is in exact numbers.

    The log-probs of policy and reference are each summed in float32 and rounded to half
    an ulp of sums of the size that is logged; beta, 0.1, multiplies the difference.
    """
    sums = (log[f"logps/{side}"] for log in run.logs for side in ("chosen", "rejected"))
    return 0.1 * float(np.spacing(np.float32(max(map(abs, sums)))))


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("method", ["lora-dpo", "lora-sft"])
def test_an_adapter_trains_on_as_in_trl(
    method: str, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """DPO: it is its own reference. SFT: DoRA, with ranks and alphas by module.

    The logs are of three steps, which differ in their number of micro-batches.
    """
    import transformers

    variants: dict[str, Any] = {
        "use_dora": True,
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"q_proj": 3},
    }
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **LORA,
        **(variants if method == "lora-sft" else {}),
    )
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter
    )
    options = {"max_steps": 6, "logging_steps": 3, "learning_rate": 1e-3}
    theirs = train_with_trl(method, model, tmp_path / "trl", **options)
    ours = train_with_jaxtrain(
        method, base, tmp_path / "trl" / "start", tmp_path / "ours", **options
    )
    assert len(ours.logs) == len(theirs.logs) == 2
    assert_equal_trainings(ours, theirs, method.removeprefix("lora-"), tied_logs=1)


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_a_synced_reference_moves_as_in_trl(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """TR-DPO: the reference takes 0.6 of the policy after every second step."""
    options = {
        "max_steps": 6, "sync_ref_model": True, "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.6,
    }  # fmt: skip
    theirs = train_with_trl("dpo", base, tmp_path / "trl", **options)
    ours = train_with_jaxtrain("dpo", base, tmp_path, tmp_path / "ours", **options)
    assert len(ours.logs) == len(theirs.logs) == 6
    assert_equal_trainings(ours, theirs, "dpo")


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_dora_under_dpo_differs_from_trl_by_rounding_alone(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two steps at the start, of learning rate 0, then four that train; a pair each.

    While policy and reference are one model, a pair's margin is 0 in exact numbers.
    PyTorch's m / |W| is 1 to the bit, so TRL's margin is 0 and its accuracy 0. Our |W|
    is another library's norm: the ratio is 1 or an ulp (1.2e-7) away, a factor that XLA
    fuses into the two passes in different ways. Sums of log-probs near -100 then differ
    by an ulp (7.6e-6), and the sign of that is no accuracy. So rewards are compared to
    within 4 ulps, and accuracies where a margin is beyond that.
    """
    ulp = float(np.spacing(np.float32(100)))
    rounding = 0.1 * 4 * ulp  # of a reward: beta is 0.1
    options = {
        "max_steps": 6, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    theirs = train_with_trl(
        "lora-dpo", base, tmp_path / "trl", use_dora=True, **options
    )
    ours = train_with_jaxtrain(
        "lora-dpo", base, tmp_path / "trl" / "start", tmp_path / "ours", **options
    )
    assert len(ours.logs) == len(theirs.logs) == 6
    decided = 0
    for log, their_log in zip(ours.logs, theirs.logs, strict=True):
        for name in DPO_METRICS:
            if name == "rewards/accuracies":
                continue
            is_reward = name.startswith("rewards/")
            np.testing.assert_allclose(
                log[name],
                their_log[name],
                rtol=1e-4,
                # Means of logits of either sign and size 1 may cancel to nearly 0.
                atol=rounding if is_reward else 1e-6 * name.startswith("logits/"),
                err_msg=name,
            )
        if abs(their_log["rewards/margins"]) > 2 * rounding:
            assert log["rewards/accuracies"] == their_log["rewards/accuracies"]
            decided += 1
        else:
            assert abs(log["rewards/margins"]) <= 2 * rounding
    assert decided == 4
    assert ours.weights.keys() == theirs.weights.keys()
    for name, tensor in theirs.weights.items():
        np.testing.assert_allclose(
            ours.weights[name], tensor, atol=1e-4, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_pissa_run_exports_an_adapter_of_the_original_base(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """DPO with DoRA too: step 1 has no margin, and `model` is base and `adapter`."""
    import transformers

    config = default_config()
    config.model.name_or_path = str(base)
    config.data.max_length = MAX_LENGTH
    config.training.training_type = "dpo"
    for name, value in (LORA_SETTINGS | {"max_steps": 3}).items():
        config.training[name] = value
    config.training.update({"num_gpus": 1, "bf16": False, "save_steps": 0})
    config.training.update({"eval_steps": 0, "report_to": ("jsonl",)})
    config.training.lora.enabled = True
    config.training.lora.update({"r": 4, "init_lora_weights": "pissa"})
    config.training.lora.use_dora = True
    trainer = TrainingOrchestrator(config, workdir=tmp_path)
    trainer.prepare()
    trainer.train(make_rows("dpo"))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)

    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, start = (m.eval()(tokens).logits for m in (adapted, load(base)))
        merged = load(tmp_path / "model").eval()(tokens).logits
    assert (expected - start).abs().max() > 0.05
    np.testing.assert_allclose(merged, expected, atol=1e-5)
