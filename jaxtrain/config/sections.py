"""The keys of a configuration: a frozen dataclass a section, and the whole schema.

`configs/base.py` says what each key does and in which unit. An annotation here is the
key's type and bounds; its default, what it holds if nobody sets it. Fields marked
`DERIVED` may be unset in a configuration and are never None in a resolved run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from jaxtrain.models.families import FAMILIES
from jaxtrain.objectives.options import PreferenceOptions
from jaxtrain.schema import (
    DERIVED,
    Bound,
    Fraction,
    FractionBelowOne,
    Leaf,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Schema,
    schema_of,
    unset,
)
from jaxtrain.tree import dotted

if TYPE_CHECKING:  # which cannot compute a Literal
    ModelType: TypeAlias = str
else:
    ModelType = Literal[tuple(FAMILIES)]
TrainingType = Literal["from_scratch", "sft", "lora", "dpo"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]


@dataclass(frozen=True)
class ArchitectureSection:
    """Sizes of a model made from scratch, by their Hugging Face names."""

    model_type: ModelType = "llama"
    vocab_size: PositiveInt | None = None
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    head_dim: PositiveInt = DERIVED
    hidden_act: Activation | None = None
    hidden_activation: Activation | None = None
    max_position_embeddings: PositiveInt = 4096
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_local_base_freq: Positive | None = None
    partial_rotary_factor: Positive | None = None
    original_max_position_embeddings: PositiveInt | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: PositiveInt | None = None
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = (
        None
    )
    sliding_window_pattern: PositiveInt | None = None
    use_sliding_window: bool | None = None
    max_window_layers: NonNegativeInt | None = None
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    query_pre_attn_scalar: Positive | None = None
    num_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: NonNegative | None = None
    initializer_range: Positive = 0.02


@dataclass(frozen=True)
class ModelSection:
    """The model, its tokenizer and its kernels."""

    name_or_path: str = ""
    tokenizer_name_or_path: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    attention: Literal[
        "auto", "reference", "xla", "cudnn", "pallas_gpu", "pallas_triton", "pallas_tpu"
    ] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    loss_chunk_tokens: PositiveInt | None = None
    scan_layers: bool = True
    architecture: ArchitectureSection = field(default_factory=ArchitectureSection)


@dataclass(frozen=True)
class DataSection:
    """Where rows come from and how they become batches."""

    train: str | tuple[dict[str, Any], ...] = ""
    eval: str = ""
    train_split: str = "train"
    eval_split: str | None = None
    format: Literal[
        "auto", "text", "prompt_completion", "messages", "preference", "labeled"
    ] = "auto"
    text_column: str = "text"
    max_length: Annotated[int, Bound(2)] = DERIVED
    packing: bool = DERIVED
    share_prompts: bool = False
    shuffle: bool = True
    on_bad_row: Literal["error", "skip"] = "error"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    chat_template: str | None = None
    max_train_rows: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None
    streaming: bool = False
    shuffle_buffer_size: PositiveInt = 10_000
    stream_window_rows: PositiveInt = 1000
    cache: bool = True
    cache_dir: str | None = None


@dataclass(frozen=True)
class OptimizerSection:
    """The optimizer and its gradient clipping."""

    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    learning_rate: NonNegative = DERIVED
    weight_decay: NonNegative = DERIVED
    adam_beta1: FractionBelowOne = 0.9
    adam_beta2: FractionBelowOne = DERIVED
    adam_epsilon: Positive = 1e-8
    momentum: FractionBelowOne | None = None
    max_grad_norm: NonNegative = 1.0


@dataclass(frozen=True)
class ScheduleKwargs:
    """Shape of the schedule; None means the schedule's own default."""

    num_cycles: Positive | None = None
    power: Positive | None = None
    lr_end: NonNegative | None = None
    min_lr: NonNegative | None = None
    min_lr_rate: Fraction | None = None
    timescale: PositiveInt | None = None
    num_decay_steps: PositiveInt | None = None
    num_stable_steps: NonNegativeInt | None = None
    warmup_type: Literal["linear", "cosine", "1-sqrt"] | None = None
    decay_type: Literal["linear", "cosine", "1-sqrt"] | None = None
    min_lr_ratio: Fraction | None = None


_WSD_KWARGS = (
    "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type",
    "min_lr_ratio", "num_cycles",
)  # fmt: skip
# Which kwargs each schedule reads: one that it would ignore is refused.
SCHEDULE_KWARGS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "polynomial": ("power", "lr_end"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "wsd": _WSD_KWARGS,
    "warmup_stable_decay": _WSD_KWARGS,
}


@dataclass(frozen=True)
class ScheduleSection:
    """At most one of `warmup_steps` and `warmup_ratio` is nonzero in a run."""

    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
        "constant", "constant_with_warmup", "inverse_sqrt", "wsd",
        "warmup_stable_decay",
    ] = DERIVED  # fmt: skip
    warmup_steps: NonNegativeInt = DERIVED
    warmup_ratio: Fraction = DERIVED
    lr_scheduler_kwargs: ScheduleKwargs = field(default_factory=ScheduleKwargs)

    @property
    def options(self) -> dict[str, Any]:
        """The `lr_scheduler_kwargs` that are set."""
        given = asdict(self.lr_scheduler_kwargs)
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class PrecisionSection:
    """Dtypes of the computation, and what the backward pass recomputes."""

    fp16: bool = False
    bf16: bool = DERIVED
    gradient_checkpointing: bool = False
    remat_policy: Literal[
        "full", "offload", "dots", "dots_no_batch", "save_attention", "minimal"
    ] = "full"

    @property
    def compute_dtype(self) -> str:
        """Dtype of activations and matrix products."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    @property
    def remat(self) -> str:
        """What the backward pass computes again: none, or the policy."""
        return self.remat_policy if self.gradient_checkpointing else "none"


@dataclass(frozen=True)
class LoopSection:
    """Lengths, batches, evaluation, checkpoints and logs of the loop."""

    num_train_epochs: Positive = DERIVED
    max_steps: int = -1
    per_device_train_batch_size: PositiveInt = 8
    per_device_eval_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    seed: Annotated[int, Bound(0, 2**32, open_high=True)] = 42
    eval_steps: NonNegativeInt | None = None
    eval_on_start: bool = False
    save_steps: NonNegativeInt | None = None
    save_total_limit: PositiveInt | None = None
    save_final_model: bool = True
    logging_steps: PositiveInt = 10
    report_to: tuple[Literal["tensorboard", "wandb", "jsonl", "none"], ...] = (
        "tensorboard",
        "jsonl",
    )
    run_name: str | None = None
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool = DERIVED
    load_best_model_at_end: bool = False
    early_stopping_patience: PositiveInt | None = None
    early_stopping_threshold: NonNegative = 0.0
    resume_from_checkpoint: Literal["auto", "never"] = "auto"
    use_auxiliary_loss: bool = False
    router_aux_loss_coef: NonNegative | None = None
    objective: str = "auto"
    objective_kwargs: dict[str, Any] | None = None
    step_timeout_secs: NonNegative = 1800.0
    on_nonfinite: Literal["error", "skip"] = "error"
    on_spike: Literal["error", "skip"] = "error"
    spike_threshold: Positive | None = None
    spike_window: Annotated[int, Bound(2)] = 50
    log_grad_norm_by_group: bool = False

    @property
    def best_metric(self) -> str:
        """`metric_for_best_model` as evaluations name it: with `eval_` before it."""
        return f"eval_{self.metric_for_best_model.removeprefix('eval_')}"


@dataclass(frozen=True)
class DeepspeedSection:
    """What is split over devices, and what rests in host memory."""

    zero_stage: Literal[0, 1, 2, 3] = DERIVED
    offload_optimizer: bool = DERIVED
    offload_param: bool = DERIVED


@dataclass(frozen=True)
class DevicesSection:
    """Devices and data loading, by the names of PyTorch's world."""

    distributed: bool = False
    num_gpus: PositiveInt | None = None
    dataloader_num_workers: NonNegativeInt = 0
    dataloader_pin_memory: bool = DERIVED
    pin_memory: bool = DERIVED
    cpu_offload: bool = False
    deepspeed: DeepspeedSection = field(default_factory=DeepspeedSection)


@dataclass(frozen=True)
class CurriculumSection:
    """From short or easy rows to all rows."""

    enabled: bool = False
    strategy: Literal["length_based", "difficulty_based"] = "length_based"
    start_length: PositiveInt = 128
    end_length: PositiveInt = DERIVED
    steps: PositiveInt = 1000
    num_buckets: PositiveInt = 5
    column: str | None = None


@dataclass(frozen=True)
class GenerationSection:
    """Texts generated at each evaluation, and what is measured on them."""

    enabled: bool = DERIVED
    metrics: tuple[str, ...] = ()
    bertscore_model: str | None = None
    num_prompts: PositiveInt = 64
    max_new_tokens: PositiveInt = 64
    temperature: NonNegative = 0.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Bound(0, 1, open_low=True)] = 1.0
    batch_size: PositiveInt = 16
    num_samples_logged: NonNegativeInt = 3


@dataclass(frozen=True)
class LoraSection:
    """Adapters (arXiv:2106.09685)."""

    enabled: bool = DERIVED
    r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: FractionBelowOne = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    use_dora: bool = False
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora"] = "default"
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None
    ensure_weight_tying: bool = False
    quantization: Literal["nf4", "int8"] | None = None
    quantization_block_size: Annotated[int, Bound(2)] = 64
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    init_from: str = ""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"


@dataclass(frozen=True)
class DpoSection(PreferenceOptions):
    """The options of the loss, and what acts on the data and on the reference model."""

    beta: Positive = DERIVED  # of the objective's own default
    max_length: Annotated[int, Bound(2)] = DERIVED
    max_prompt_length: PositiveInt | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: Fraction = 0.6
    ref_model_sync_steps: PositiveInt = 512


@dataclass(frozen=True)
class MeshSection:
    """Sizes of the device mesh. -1 is left only where the device count is unknown."""

    data: int = DERIVED
    fsdp: int = DERIVED
    tensor: int = 1
    context: int = 1
    expert: int = 1
    stage: int = 1
    dcn_data: PositiveInt | None = None
    dcn_fsdp: PositiveInt | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes by axis name; `expert` and `stage` are always 1 and left out."""
        return {
            "data": self.data,
            "fsdp": self.fsdp,
            "context": self.context,
            "tensor": self.tensor,
        }

    @property
    def slices(self) -> dict[str, int]:
        """Over how many slices an axis goes, where that is set."""
        named = {"data": self.dcn_data, "fsdp": self.dcn_fsdp}
        return {axis: count for axis, count in named.items() if count is not None}


# What `generation.metrics` may name, beside functions of one's own.
# Text metrics, and what each is recorded as behind `eval_`.
TEXT_METRIC_SCORES = {
    "exact_match": ("exact_match",),
    "bleu": ("bleu",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "bertscore": ("bertscore_precision", "bertscore_recall", "bertscore_f1"),
}
TEXT_METRIC_NAMES = tuple(TEXT_METRIC_SCORES)

# The sections whose keys stand directly under `training`.
TRAINING_SECTIONS: Mapping[str, type] = {
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "precision": PrecisionSection,
    "loop": LoopSection,
    "devices": DevicesSection,
}
PLAIN_SECTIONS: Mapping[str, type] = {
    "model": ModelSection,
    "data": DataSection,
    "mesh": MeshSection,
}


def make_schema() -> Schema:
    """Every key, as a configuration nests them."""
    general: Schema = {}
    for section in TRAINING_SECTIONS.values():
        general |= schema_of(section)
    general["curriculum"] = schema_of(CurriculumSection)
    general["generation"] = schema_of(GenerationSection)
    override = unset(general)
    training = {
        "training_type": Leaf(TrainingType, "sft"),
        **general,
        "from_scratch": override,
        "sft": override,
        "lora": schema_of(LoraSection) | override,
        "dpo": schema_of(DpoSection) | override,
    }
    plain = {name: schema_of(section) for name, section in PLAIN_SECTIONS.items()}
    return {**plain, "training": training}


# What a DERIVED key of `training` is by training_type. LoRA, DPO and SFT: the
# defaults of TRL 1.16. From scratch: what small language models are trained with.
_FINE_TUNING = {
    "num_train_epochs": 3.0,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
}
TYPE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "from_scratch": {
        "learning_rate": 3e-4,
        "num_train_epochs": 1.0,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.01,
    },
    "sft": {"learning_rate": 2e-5, **_FINE_TUNING},
    "lora": {"learning_rate": 2e-4, **_FINE_TUNING},
    "dpo": {"learning_rate": 1e-6, **_FINE_TUNING},
}
# Few new parameters that start at zero bear, and need, a larger step.
LORA_LEARNING_RATES = {"sft": 2e-4, "lora": 2e-4, "dpo": 1e-5}
DEFAULT_MAX_LENGTH = 1024

SCHEMA = make_schema()
GENERAL_KEYS = tuple(dotted(SCHEMA["training"]["sft"]))
