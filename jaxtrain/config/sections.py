"""The keys of a configuration: a frozen dataclass a section, and the whole schema.

A key is declared here and nowhere else: its annotation says its type and bounds, its
unit and the condition of its effect; the text below it is its documentation, and the
docstring of the section stands above its keys in docs/configuration.md. Keys marked
`DERIVED` may be unset in a configuration and are never None in a resolved run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from jaxtrain import schema
from jaxtrain.config.eval_sets import by_name
from jaxtrain.models.families import FAMILIES
from jaxtrain.objectives.options import PreferenceOptions
from jaxtrain.schema import (
    DERIVED,
    Bound,
    ByType,
    ForShares,
    Fraction,
    FractionBelowOne,
    NoEffect,
    NonNegative,
    NonNegativeInt,
    OneOf,
    OnlyIf,
    Own,
    Positive,
    PositiveInt,
    ReadBy,
    Unit,
    Unless,
    schema_of,
)
from jaxtrain.tree import dotted

TrainingType = Literal["from_scratch", "sft", "lora", "dpo"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]
LayerType = Literal["full_attention", "sliding_attention", "conv"]
Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["nf4", "int8", "fp8"]
Tracker = Literal["tensorboard", "wandb", "jsonl", "none"]

TOKENS, ROWS, STEPS = Unit("tokens"), Unit("rows"), Unit("optimizer steps")
STREAMED = OnlyIf("data.streaming")
WITH_ADAPTERS = OnlyIf("training.lora.enabled", True, "training.lora.enabled is false")
ALL_TRAIN = OnlyIf(
    "training.lora.enabled", False, "adapters are float32, on a base in compute dtype"
)
EXPORTED = OnlyIf("training.save_final_model")
SPIKES = OnlyIf("training.spike_threshold")
SYNCED = OnlyIf("training.dpo.sync_ref_model")
DRAWN = Unless(
    "training.generation.temperature",
    0,
    "generation.temperature is 0: the likeliest token is taken",
)
NEW_ADAPTERS = OnlyIf(
    "training.lora.init_from", "", "training.lora.init_from brings its own"
)


@dataclass(frozen=True)
class ArchitectureSection:
    """Sizes for from_scratch, by the names of a Hugging Face config.json."""

    ONLY_IF: ClassVar = OnlyIf(
        "training.training_type", "from_scratch", "sizes come with the checkpoint"
    )

    model_type: Annotated[str, OneOf(FAMILIES)] = "llama"
    """The family."""
    vocab_size: PositiveInt | None = None
    """Unset: the tokenizer's."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 384
    """Width of the MLP."""
    num_hidden_layers: PositiveInt = 4
    """Number of layers."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_key_value_heads: PositiveInt = 2
    """Key and value heads."""
    head_dim: PositiveInt = DERIVED
    """Unset: hidden_size / num_attention_heads."""
    hidden_act: Activation | None = None
    """Unset: the model_type's, as below."""
    hidden_activation: Activation | None = None
    """hidden_act's name in Gemma 2 and 3."""
    max_position_embeddings: Annotated[PositiveInt, TOKENS] = 4096
    """Longest row."""
    rms_norm_eps: Positive = 1e-6
    """Added to the mean square in RMSNorm; Cohere 2's layer_norm_eps."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """{"rope_type": "llama3" | "linear" | "yarn" | "dynamic", ...}, as in
    config.json."""
    rope_local_base_freq: Positive | None = None
    """Gemma 3: rope_theta of sliding layers."""
    partial_rotary_factor: Positive | None = None
    """Phi-3, GLM-4: the share of head_dim that is rotated."""
    original_max_position_embeddings: Annotated[PositiveInt | None, TOKENS] = None
    """Phi-3: max_position_embeddings before scaling."""
    tie_word_embeddings: bool = True
    """Use the embedding as the head too."""
    attention_bias: bool | None = None
    """Biases of the attention's projections."""
    mlp_bias: bool | None = None
    """Biases of the MLP."""
    sliding_window: Annotated[PositiveInt | None, TOKENS] = None
    """Tokens that a sliding layer reads."""
    layer_types: tuple[LayerType, ...] | None = None
    """The kind of each layer, in order."""
    sliding_window_pattern: PositiveInt | None = None
    """Gemma 2 and 3, Cohere 2: one layer in this many is full."""
    use_sliding_window: bool | None = None
    """Qwen: whether any layer slides."""
    max_window_layers: NonNegativeInt | None = None
    """Qwen: layers before the first sliding one."""
    attn_logit_softcapping: Positive | None = None
    """Gemma 2."""
    final_logit_softcapping: Positive | None = None
    """Gemma 2."""
    query_pre_attn_scalar: Positive | None = None
    """Gemma: attention scale ** -2."""
    no_rope_layer_interval: PositiveInt | None = None
    """SmolLM3: one layer in this many does not rotate queries and keys."""
    embedding_multiplier: Positive | None = None
    """Granite: what embeddings are multiplied by."""
    residual_multiplier: Positive | None = None
    """Granite: what attention and MLP are multiplied by where they are added."""
    attention_multiplier: Positive | None = None
    """Granite: the attention scale. Unset: 1."""
    logits_scaling: Positive | None = None
    """Granite: what logits are divided by."""
    logit_scale: Positive | None = None
    """Cohere 2: what logits are multiplied by."""
    conv_L_cache: PositiveInt | None = None
    """LFM2: tokens that a layer of type conv reads."""
    conv_bias: bool | None = None
    """LFM2: biases of such layers."""
    num_experts: PositiveInt | None = None
    """Mixtures of experts: the MLPs in each layer."""
    num_experts_per_tok: PositiveInt | None = None
    """Mixtures of experts: how many of them a token goes to."""
    moe_intermediate_size: PositiveInt | None = None
    """Mixtures of experts except mixtral and gpt_oss: width of one expert."""
    norm_topk_prob: bool | None = None
    """Qwen's mixtures, GLM-4.5, DeepSeek V3: let the weights of a token's experts sum
    to 1."""
    router_aux_loss_coef: NonNegative | None = None
    """training.router_aux_loss_coef, where that is unset."""
    initializer_range: Positive = 0.02
    """Standard deviation of new weights."""


@dataclass(frozen=True)
class ModelSection:
    """The model, its tokenizer and its kernels."""

    name_or_path: str = ""
    """A local Hugging Face directory, the address of one in a bucket (gs://, s3://) or
    a hub name. "": the model that comes with jaxtrain. from_scratch takes only its
    sizes and its tokenizer; there "" means those of `architecture`."""
    tokenizer_name_or_path: str = ""
    """The tokenizer's directory, bucket address or hub name, if it is not that of the
    model. "" with `architecture`: the tokenizer that comes with jaxtrain."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Unset: the default branch."""
    trust_remote_code: bool = False
    """Let a hub repository's own code run to load its tokenizer."""
    attention: Literal[
        "auto",
        "reference",
        "xla",
        "xla_blocks",
        "cudnn",
        "pallas_gpu",
        "pallas_triton",
        "pallas_tpu",
    ] = "auto"
    """Attention kernel. auto: the fastest one, by measurements, that supports the
    shapes; the log says which. xla_blocks runs on every device and skips masked blocks
    of packed rows, as the pallas kernels do."""
    param_dtype: Annotated[Dtype, ALL_TRAIN] = "float32"
    """The type of trained parameters. The compute dtype is set by training.bf16 and
    fp16, and LoRA's frozen base and DPO's reference are kept in it. Adapters are always
    float32."""
    export_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, EXPORTED
    ] = None
    """The type of exported weights. Unset: the type in which they are kept."""
    grow_vocabulary: bool = False
    """Add a row to the embedding and the head for each token of the tokenizer that has
    none: the mean of the other rows, which is then trained. With LoRA, name
    embed_tokens (and lm_head, if it is a separate matrix) in modules_to_save. False: a
    row of data that holds such a token is a bad row."""
    export_text_only: Annotated[bool, EXPORTED] = False
    """Export the text model of a model of text and images (Gemma 3 from 4B on, Mistral
    Small 3.1, Ministral 3) alone. False: export the original directory with the text
    model's weights replaced, each in the type that it has there unless export_dtype is
    set; everything else is copied, so that images still work."""
    loss_chunk_tokens: Annotated[PositiveInt | None, TOKENS] = None
    """How many tokens' logits the loss computes at once: fewer need less memory and
    more time. Unset: 512, less for models narrower than 1280."""
    scan_layers: bool | None = None
    """true: compile one layer and use it for all. false: compile each layer on its own,
    which is 12 to 16% faster on an H100 (3% with mesh.fsdp) and needs 6% less memory,
    but compiles 36 layers in about 28 s instead of 12. Unset: false on GPUs, for up to
    48 layers that are neither offloaded nor quantized to int8, and in fp8 on one GPU
    only; true elsewhere."""
    expert_exchange: Annotated[
        Literal["auto", "weights", "tokens", "copies"], Unless("mesh.expert", 1)
    ] = "auto"
    """Under mesh.expert, how a mixture's tokens and experts come together. weights: all
    experts are gathered for each layer. tokens: a device gathers the tokens of all
    mesh.expert devices and applies its own experts. copies: each token goes to the
    devices of its experts, by all-to-all. auto: whichever moves the fewest bytes; the
    log says which. All give the same numbers."""
    expert_room: Annotated[Positive, Unless("mesh.expert", 1)] = 1.25
    """With tokens and copies: the size of the buffers for copies of tokens, as a
    multiple of what would arrive if all experts were equally popular (with tokens, at
    least 2). If more arrive, that layer gathers the weights instead: no token is
    dropped. The value of mesh.expert is always enough."""
    rope_scaling: dict[str, Any] | None = None
    """Extend the context of the loaded model, to train on longer rows, as in
    config.json: {"rope_type": "yarn", "factor": 4.0,
    "original_max_position_embeddings": 32768}. It replaces the model's own scaling,
    raises max_position_embeddings to factor times the original length, and is written
    to the exported config.json. Unset: the model's own scaling."""
    architecture: ArchitectureSection = field(default_factory=ArchitectureSection)


@dataclass(frozen=True)
class DataSection:
    """Where rows come from and how they become batches."""

    train: str | tuple[dict[str, Any], ...] = ""
    """A file (jsonl, json, parquet, csv, arrow, txt, array_record), a folder of them,
    either of these by its address in a bucket (gs://, s3://), or a hub name. "": the
    data that comes with jaxtrain, of the kind training_type needs. A mixture:
    "a.jsonl:0.7,b.jsonl:0.3", or a list of {"path", "weight"}. The weights are the
    shares of rows (with packing: of packed rows) in each epoch, which is as long as all
    data sets together; rows repeat, or wait for a later epoch."""
    eval: str | dict[str, Any] = ""
    """Held-out rows, given like `train`. "": the embedded ones if `train` is "" too,
    else `eval_split` of `train`. Several sets by name, {helpful: a.jsonl, safe:
    b.jsonl}, are evaluated separately, and their metrics contain the name:
    eval_helpful_loss."""
    train_split: str = "train"
    """The split of `train` to train on."""
    eval_split: str | None = None
    """The split of `train` to evaluate on, if `eval` is "". Unset: none."""
    format: Literal[
        "auto", "text", "prompt_completion", "messages", "preference", "labeled"
    ] = "auto"
    """What a row contains. auto: the columns decide. labeled: prompt, completion and
    label, for KTO."""
    text_column: Annotated[str, OnlyIf("data.format", ("auto", "text"))] = "text"
    """The column of format text."""
    format_row: Own | None = None
    """A function of your own that turns each row (a mapping of its columns) into one
    that `format` reads: see docs/extending.md. It is applied before column_map."""
    column_map: dict[str, Any] | None = None
    """Names of columns in the files, by our names: {prompt: "Question Text",
    completion: Answer}. It applies to every data set of the run, including evaluation
    rows."""
    max_length: Annotated[int, Bound(2), TOKENS] = DERIVED
    """Length of a row, prompt and completion together. Unset: 1024, or the end of an
    enabled curriculum; under dpo, training.dpo.max_length."""
    packing: bool | Literal["batch"] = DERIVED
    """Put several documents or pairs into a row, each blind to the others. batch: those
    of each micro-batch, so every step has the examples and the numbers that it would
    have without packing, and no more padding than it must. true: those of the whole
    data set (of a stream, those of each window), ahead of training, and the batch
    sizes count packed rows, as in TRL. false: every example has a padded row. Unset:
    true from_scratch, else batch; false for losses of your own, which may take a row
    for an example. What a loss rules out gives way to what it allows; the log says so.
    """
    share_prompts: bool = DERIVED
    """Preference rows: compute each prompt once, followed by its two completions in the
    same row, which do not see each other. The results are the same with fewer tokens;
    with packing true a row holds up to 2 * max_length of them. It is not done for
    models whose attention or positions do not allow it. Unset: true with packing
    batch."""
    shuffle: bool = True
    """Shuffle the rows in each epoch, with an order that depends on training.seed."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is malformed or has nothing to train on."""
    completion_only_loss: Annotated[
        bool | None, Unless("training.training_type", "dpo")
    ] = None
    """Train on completions, not prompts. Unset: wherever rows have prompts."""
    assistant_only_loss: bool = False
    """messages: train on assistant turns only. A message's own `train` (true or false)
    or `weight` (0 or 1) chooses single turns."""
    train_on_turns: Literal["all", "last"] = "all"
    """With assistant_only_loss: which turns are trained if a message does not say so
    itself: all, or only the last one."""
    train_on_thinking: bool = True
    """With assistant_only_loss: train on the blocks of thoughts (`<think>`, `[THINK]`)
    in these turns too."""
    preserve_thinking: bool = False
    """With assistant_only_loss: write each assistant turn as the chat template writes
    the last one, so that earlier turns keep their thoughts, as in TRL's templates for
    training."""
    chat_template: str | None = None
    """Jinja template, a file of one, which may be in a bucket, or the name of one of
    the tokenizer's several templates. Unset: the tokenizer's."""
    max_train_rows: Annotated[PositiveInt | None, ROWS] = None
    """Train on the first rows only. Unset: on all."""
    max_eval_rows: Annotated[PositiveInt | None, ROWS] = None
    """Evaluate on the first rows only, of each set. Unset: on all."""
    streaming: bool = False
    """Read training rows when they are needed instead of loading all of them, for data
    larger than the disk. Rows are checked when they are read, and max_steps must be
    set. Without packing, rows are padded to max_length. Evaluation rows are not
    streamed."""
    shuffle_buffer_size: Annotated[
        PositiveInt, ROWS, STREAMED, OnlyIf("data.shuffle")
    ] = 10_000
    """Rows shuffled together, over all devices; at least a window on each."""
    stream_window_rows: Annotated[PositiveInt, ROWS, STREAMED] = 1000
    """Rows tokenized, and packed best-fit, together."""
    cache: bool = True
    """Keep token ids on disk, under a hash of data, tokenizer and options, and map them
    into memory, so that later runs and other processes need not tokenize again.
    Streamed rows are not cached."""
    cache_dir: Annotated[str | None, OnlyIf("data.cache")] = None
    """The folder of the cache. Unset: $JAXTRAIN_CACHE, or ~/.cache/jaxtrain."""
    dataset_num_proc: PositiveInt | None = None
    """Processes that tokenize rows before training, if that takes more than a few
    seconds; the result is the same. Unset: one for each core. Streams use
    training.dataloader_num_workers instead."""

    @property
    def eval_paths(self) -> dict[str, str]:
        """What `eval` says of each set by its name; "" is the name of a single one."""
        named: Any = self.eval
        return by_name(named)


WITH_BETAS = OnlyIf("training.optimizer", ("adamw", "lion", "muon"))
WITH_MOMENTS = OnlyIf("training.optimizer", ("adamw", "lion", "muon", "sgd"))


@dataclass(frozen=True)
class OptimizerSection:
    """The optimizer and its gradient clipping."""

    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] | Own = "adamw"
    """The optimizer. Your own is a function of (schedule, weight_decay) that returns an
    optax transformation: see docs/extending.md."""
    learning_rate: Annotated[NonNegative, ByType(3e-4, 2e-5, 2e-4, 1e-6)] = DERIVED
    """The peak. Unset: by type."""
    weight_decay: Annotated[NonNegative, ByType(0.1, 0.0, 0.0, 0.0)] = DERIVED
    """Never applied to norms and biases. Unset: by type."""
    adam_beta1: Annotated[FractionBelowOne, WITH_BETAS] = 0.9
    """Decay of the mean of gradients; muon's for what it leaves to AdamW."""
    adam_beta2: Annotated[
        FractionBelowOne, WITH_BETAS, ByType(0.95, 0.999, 0.999, 0.999)
    ] = DERIVED
    """Decay of the mean of their squares. Unset: by type."""
    adam_epsilon: Annotated[
        float,
        Bound(0, 1, open_low=True),
        OnlyIf("training.optimizer", ("adamw", "muon")),
    ] = 1e-8
    """Added to the denominator of Adam's update."""
    moment_dtype: Annotated[Literal["float32", "bfloat16", "int8"], WITH_MOMENTS] = (
        "float32"
    )
    """What the optimizer's moments of matrices are kept in between steps, rounded
    stochastically. adamw then adds, for each trainable parameter: float32: 8 bytes;
    bfloat16: 4; int8: 2, on a logarithmic scale for each row or column of a matrix."""
    momentum: FractionBelowOne | None = None
    """sgd (unset: 0) and muon (unset: 0.95)."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this global norm. 0: they are not clipped."""
    lr_multipliers: tuple[tuple[str | float, ...], ...] = ()
    """The learning rate by parameter, times a number: [["embed.*", 0.1],
    ["layers/[0-3]/.*", 0], [".*", 1]]. The first regular expression counts that matches
    the whole name; every parameter must be matched, every pattern match one. 0 freezes:
    no update, no decay, no part in grad_norm. docs/extending.md has the names."""
    ema_decay: Annotated[float | None, Bound(0, 1, open_low=True, open_high=True)] = (
        None
    )
    """Keep an exponential moving average of the weights (arXiv:2411.18704), of which
    this share stays at each step; evaluations and exports take it. 4 bytes for each
    parameter. Unset: none."""


RampShape = Literal["linear", "cosine", "1-sqrt"]
WSD = ReadBy("wsd", "warmup_stable_decay")


@dataclass(frozen=True)
class ScheduleKwargs:
    """Shape of the schedule. Unset: transformers' default."""

    power: Annotated[Positive | None, ReadBy("polynomial")] = None
    """Power of the decay; 1 is linear."""
    lr_end: Annotated[NonNegative | None, ReadBy("polynomial")] = None
    """The last learning rate."""
    min_lr: Annotated[NonNegative | None, ReadBy("cosine_with_min_lr")] = None
    """The last learning rate."""
    min_lr_rate: Annotated[Fraction | None, ReadBy("cosine_with_min_lr")] = None
    """The same, as a share of learning_rate."""
    timescale: Annotated[PositiveInt | None, STEPS, ReadBy("inverse_sqrt")] = None
    """Scale of the decay."""
    num_decay_steps: Annotated[PositiveInt | None, STEPS, WSD] = None
    """Unset: a tenth of the run."""
    num_stable_steps: Annotated[NonNegativeInt | None, STEPS, WSD] = None
    """Unset: what remains."""
    warmup_type: Annotated[RampShape | None, WSD] = None
    """Shape of the warm-up."""
    decay_type: Annotated[RampShape | None, WSD] = None
    """Shape of the decay."""
    min_lr_ratio: Annotated[Fraction | None, WSD] = None
    """The last learning rate as a share of the peak."""
    num_cycles: Annotated[
        Positive | None,
        ReadBy("cosine", "cosine_with_restarts", "cosine_with_min_lr", *WSD.names),
    ] = None
    """Waves of the cosine."""


@dataclass(frozen=True)
class ScheduleSection:
    """The learning rate's schedule; a run has one of the two warm-up keys at most."""

    lr_scheduler_type: Annotated[Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
        "constant", "constant_with_warmup", "inverse_sqrt", "wsd",
        "warmup_stable_decay",
    ] | Own, ByType("cosine", "linear", "linear", "linear")] = DERIVED  # fmt: skip
    """Each is as in transformers; warmup_stable_decay is wsd's other name. Your own is
    a function of (learning_rate, total_steps, warmup_steps) that returns a function of
    the step: see docs/extending.md. Unset: by type."""
    warmup_steps: Annotated[
        NonNegativeInt, STEPS, ForShares("training.warmup_ratio")
    ] = DERIVED
    """Above 0, it overrules warmup_ratio."""
    warmup_ratio: Annotated[Fraction, ByType(0.01, 0.0, 0.0, 0.0)] = DERIVED
    """Share of all steps. Unset: by type."""
    lr_scheduler_kwargs: ScheduleKwargs = field(default_factory=ScheduleKwargs)

    @property
    def options(self) -> dict[str, Any]:
        """The `lr_scheduler_kwargs` that are set."""
        given = asdict(self.lr_scheduler_kwargs)
        return {name: value for name, value in given.items() if value is not None}


# From the policy that keeps most for the backward pass, and is the fastest, to the one
# that keeps least: what `auto` and the search of `jaxtrain.aot` choose from.
REMATS = ("none", "minimal", "save_attention", "full")
# Of unrolled layers "full" can act on some, which beats "save_attention".
UNROLLED_REMATS = ("none", "minimal", "full")


@dataclass(frozen=True)
class PrecisionSection:
    """Dtypes of the computation, and what the backward pass recomputes."""

    fp16: bool = False
    """float16 compute with dynamic loss scaling."""
    bf16: bool = DERIVED
    """bfloat16 compute. Unset: true unless fp16. Both false: float32."""
    fp8: bool = False
    """Multiply in eight bits what bf16 multiplies in the layers' projections, forward
    and for both gradients; all else stays in bfloat16, and trained weights as they are
    kept. Needs an NVIDIA GPU of compute capability 8.9 or later (L4, RTX 40, H100,
    H200, B200) or a TPU7x; a CPU computes the same slowly. LoRA's frozen base and DPO's
    reference are kept in eight bits, half of their bytes. See docs/fp8.md."""
    reduce_dtype: Annotated[
        Literal["float32"] | None, ALL_TRAIN, Unless("training.fp8")
    ] = None
    """Dtype in which devices add up the gradients of the layers' projections, and with
    bf16 on Hopper GPUs of the head. Unset: the compute dtype, to which each device
    rounds its own first; those of norms, and of an embedding as a table of inputs, are
    float32 always. float32: twice the bytes over the links."""
    full_determinism: bool = False
    """On GPUs, choose kernels without timing them, and only such as add up in a certain
    order, so that a run gives the same bits on any machine with the same GPUs and
    versions. See docs/reliability.md for what holds without it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass."""
    remat_policy: Annotated[Literal[
        "full", "offload", "dots", "dots_no_batch", "save_attention", "minimal", "auto"
    ], OnlyIf("training.gradient_checkpointing")] = "full"  # fmt: skip
    """What gradient_checkpointing computes again. full: all of a layer; offload: that,
    from an input in pinned host memory; dots: all but matrix products; dots_no_batch:
    all but products with weights; save_attention: all but attention; minimal: only what
    is cheap. auto: the fastest of nothing at all, minimal, save_attention and full that
    fits the device by the compiler's account, or, where layers are unrolled, full for
    so few of them that the step fits; it compiles one after the other before the first
    step of each shape of batch, and the log says which it took."""
    remat_layers: Annotated[
        int | None,
        Bound(-1),
        OnlyIf("training.gradient_checkpointing"),
        Unless("training.remat_policy", "auto"),
    ] = None
    """How many layers, from the first, remat_policy acts on (-1: all); the later ones
    compute again only what is cheap, as by minimal. Unset: all; but by full, where
    layers are unrolled and their weights trained, so few that what the last ones keep
    takes at most 3/4 of the weights' memory (gradients, which come later, take 1/2);
    3/2 where devices have parts of the weights."""
    reshard_after_forward: Annotated[
        bool, OnlyIf("training.gradient_checkpointing")
    ] = True
    """Gather the weights that devices share once more in the backward pass. False keeps
    them whole from the forward pass on: less to send, and each device holds a copy of
    all layers in the compute dtype. Without gradient_checkpointing they are kept."""

    @property
    def compute_dtype(self) -> str:
        """Dtype of activations and matrix products."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    @property
    def remat(self) -> str:
        """What the backward pass computes again: none, or the policy."""
        return self.remat_policy if self.gradient_checkpointing else "none"

    def with_remat(self, remat: str, layers: int = -1) -> "PrecisionSection":
        """These settings with another policy of so many layers, or "none"."""
        keeps_all = remat == "none"
        policy = self.remat_policy if keeps_all else remat
        changed: dict[str, Any] = {"remat_policy": policy, "remat_layers": layers}
        return replace(self, gradient_checkpointing=not keeps_all, **changed)


@dataclass(frozen=True)
class LoopSection:
    """Lengths, batches, evaluation, checkpoints and logs; what to do on bad steps."""

    num_train_epochs: Annotated[Positive, ByType(1.0, 3.0, 3.0, 3.0)] = DERIVED
    """Passes over the training rows. Unset: by type."""
    max_steps: Annotated[int, STEPS] = -1
    """Above 0, it overrules num_train_epochs."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows (dpo: pairs) of a micro-batch on each device."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows (dpo: pairs) of an evaluation batch on each device."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in an optimizer step."""
    seed: Annotated[int, Bound(0, 2**32, open_high=True)] = 42
    """Seed of new weights, data order and dropout."""
    eval_steps: NonNegativeInt | None = None
    """Steps between evaluations. 0: never. Unset: after each epoch."""
    eval_on_start: bool = False
    """Evaluate before the first step."""
    save_steps: NonNegativeInt | None = None
    """Steps between checkpoints. 0: never. Unset: after each epoch."""
    save_total_limit: Annotated[
        PositiveInt | None, Unless("training.save_steps", 0)
    ] = None
    """Checkpoints kept. Unset: all."""
    save_final_model: bool = True
    """Export in Hugging Face's format at the end of the run."""
    push_to_hub: Annotated[str | None, EXPORTED] = None
    """A repository on the hub, as owner/name, that the export is uploaded to: the
    adapter where there is one, else the model. A new repository is private. Needs `hf
    auth login` or HF_TOKEN, which is checked before anything is loaded. Unset: none."""
    logging_steps: PositiveInt = 10
    """Steps between records of the log."""
    report_to: tuple[Tracker | Own, ...] = ("tensorboard", "jsonl")
    """Where metrics go; none stands alone. A tracker of your own is a class, as
    module:Class: see docs/extending.md."""
    run_name: str | None = None
    """Unset: the work directory's name."""
    metric_for_best_model: str = "eval_loss"
    """The name of the metric as in the log; `eval_` may be left out. If there are
    several evaluation sets, it is a metric of one of them, such as eval_helpful_loss:
    by default the first set's loss, but it must be set if early_stopping_patience or
    load_best_model_at_end use it."""
    greater_is_better: bool = DERIVED
    """Unset: false for a name that ends in loss, perplexity or kl."""
    load_best_model_at_end: Annotated[bool, EXPORTED] = False
    """Export the best checkpoint, not the last."""
    early_stopping_patience: PositiveInt | None = None
    """Evaluations without improvement before stopping. Unset: never stop."""
    early_stopping_threshold: Annotated[
        NonNegative, OnlyIf("training.early_stopping_patience")
    ] = 0.0
    """The least change that counts as an improvement."""
    resume_from_checkpoint: Literal["auto", "never"] = "auto"
    """auto: continue from the last checkpoint in the work directory, if there is one.
    never: refuse to write over it; where checkpoints were lost, begin anew."""
    use_auxiliary_loss: bool = False
    """Add the loss of a TrainingOrchestrator subclass."""
    router_aux_loss_coef: NonNegative | None = None
    """Weight of a mixture of experts' load-balancing loss (the metric aux_loss). Unset:
    the model's own config says. 0: off. Refused for other models."""
    router_z_loss_coef: NonNegative | None = None
    """Weight of a mixture of experts' router z-loss (ST-MoE, arXiv:2202.08906, with
    1e-3), which keeps its logits small: log^2 of the denominator of the router's
    softmax, averaged over tokens and layers (the metric router_z_loss). Unset or 0:
    reported only. Refused for other models."""
    router_bias_update_rate: NonNegative | None = None
    """Balance a mixture's experts without a loss (arXiv:2408.15664; DeepSeek-V3,
    arXiv:2412.19437, with 1e-3): after each step the bias by which a router chooses an
    expert, and which weighs nothing, rises by this where the expert got fewer tokens
    than the mean, and falls where it got more. For models whose weights have that bias
    (e_score_correction_bias: DeepSeek-V3, Kimi K2, GLM-4.5); not under lora, where it
    is frozen. Unset or 0: it stays as it is."""
    objective: str = "auto"
    """auto (next_token; under dpo: preference); orpo, cpo, simpo or kto, all of
    training_type dpo; or module:function, your own: see jaxtrain.objectives."""
    objective_kwargs: dict[str, Any] | None = None
    """Its keyword arguments. Of training.dpo, beta and label_smoothing go to an
    objective that takes them; each may be set in one place only."""
    z_loss_weight: Positive | None = None
    """Add this times log^2 Z to each trained token's loss, Z the softmax's denominator
    (PaLM, arXiv:2204.02311, with 1e-4); the metric z_loss is log^2 Z. Not under dpo.
    Unset: none."""
    neftune_noise_alpha: Positive | None = None
    """Add noise to the embeddings of training rows (NEFTune, arXiv:2310.05914): uniform
    in [-1, 1) times this over sqrt(L D), for L tokens of width D. Rows are then not
    packed. Not under dpo. Unset: none."""
    callbacks: tuple[Own, ...] = ()
    """Classes of your own, as module:Class, whose methods are called after steps and
    evaluations and before saves, and which may log numbers and stop the run: see
    docs/extending.md."""
    row_metrics: tuple[Own, ...] = ()
    """Functions of your own, as module:function, that get the held-out rows at each
    evaluation, their texts and their log-probs, and return numbers: see
    docs/extending.md. Not under dpo."""
    function_kwargs: dict[str, Any] | None = None
    """Keyword arguments of your own parts, by their names: {"my_parts:Stop": {loss:
    2.0}}. For callbacks, row_metrics, lr_scheduler_type, optimizer and data.format_row;
    those of an objective are objective_kwargs."""
    step_timeout_secs: NonNegative = 1800.0
    """If no step, evaluation batch or save finishes for this many seconds, the process
    ends and prints the stacks of all its threads, so a hang becomes an error. While a
    run starts and exports, it ends if a disk does not answer for as long. 0: never."""
    on_nonfinite: Annotated[Literal["error", "skip"], Unless("training.fp16")] = "error"
    """What to do if a gradient is not finite. error: stop and name the step. skip:
    leave the weights unchanged. In both cases the batch is saved in bad_batches/. fp16
    always skips such steps, to find its scale."""
    on_spike: Annotated[Literal["error", "skip"], SPIKES] = "error"
    """The same for a spike of the loss."""
    spike_threshold: Positive | None = None
    """A loss is a spike if it is more than this many standard deviations above the mean
    of the last spike_window losses. Unset: no check for spikes."""
    spike_window: Annotated[int, Bound(2), STEPS, SPIKES] = 50
    """Number of losses that a loss is compared with to find a spike."""
    log_grad_norm_by_group: bool = False
    """Log grad_norm/embed, attention, mlp, norm, head and lora besides grad_norm."""

    @property
    def best_metric(self) -> str:
        """`metric_for_best_model` as evaluations name it: with `eval_` before it."""
        return f"eval_{self.metric_for_best_model.removeprefix('eval_')}"

    @property
    def ranks_by_metric(self) -> bool:
        """Whether an early stop or the exported model depends on `best_metric`."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None


@dataclass(frozen=True)
class DeepspeedSection:
    """What is split over devices, and what rests in host memory."""

    zero_stage: Literal[0, 1, 2, 3] = DERIVED
    """What is split over devices. 0: nothing that a step needs; 1, 2: optimizer state
    (XLA scatters gradients in either); 3: parameters too, over mesh.fsdp and
    mesh.expert. Unset: 3 if mesh.fsdp is above 1, else 0, where mesh.expert splits
    experts alone. Below 3, GPUs of one host that share mesh.data keep and update
    weights in parts (docs/scaling.md)."""
    offload_optimizer: bool = DERIVED
    """Keep optimizer state in pinned host memory between steps. Unset: as
    cpu_offload."""
    offload_param: bool = DERIVED
    """The same for parameters."""


@dataclass(frozen=True)
class DevicesSection:
    """Devices and data loading, by PyTorch's names. `provenance` in a run's config.json
    says what each became."""

    distributed: Annotated[
        bool, NoEffect("the launcher's environment names the processes; see mesh")
    ] = False
    """PyTorch's switch for several processes."""
    num_gpus: PositiveInt | None = None
    """Devices to use. Unset: all. More than are present: an error."""
    dataloader_num_workers: NonNegativeInt = 0
    """Processes that prepare rows. 0: this one."""
    dataloader_pin_memory: bool = DERIVED
    """Copy the next batch to the devices while they compute. Unset: true."""
    pin_memory: bool = DERIVED
    """The same key by DeepSpeed's name."""
    cpu_offload: bool = False
    """Both deepspeed.offload_* at once."""
    deepspeed: DeepspeedSection = field(default_factory=DeepspeedSection)


@dataclass(frozen=True)
class CurriculumSection:
    """From short or easy rows to all rows, over `steps` steps."""

    ONLY_IF: ClassVar = OnlyIf("training.curriculum.enabled")

    enabled: bool = False
    """Whether there is a curriculum."""
    strategy: Literal["length_based", "difficulty_based"] = "length_based"
    """What makes a row early."""
    start_length: Annotated[PositiveInt, TOKENS] = 128
    """length_based: the first rows are no longer than this. difficulty_based: the share
    of the easiest rows to start with is start_length / end_length."""
    end_length: Annotated[PositiveInt, TOKENS] = DERIVED
    """Unset: data.max_length."""
    steps: Annotated[PositiveInt, STEPS] = 1000
    """Length of the curriculum."""
    num_buckets: PositiveInt = 5
    """Levels that the limit counts in, evenly spaced on a logarithmic scale. Each is
    one length of batches, so one compilation at most."""
    column: str | None = None
    """difficulty_based: the column of numbers that tells how hard a row is. Unset: the
    model's own loss before training; under dpo, how much less likely a token of the
    chosen completion is to it than one of the rejected."""


@dataclass(frozen=True)
class GenerationSection:
    """Held-out prompts are continued at each evaluation, and the texts measured.

    How they are drawn is, where unset, as the model's generation_config.json has it.
    """

    ONLY_IF: ClassVar = OnlyIf("training.generation.enabled")

    enabled: bool = DERIVED
    """Unset: whether metrics are named."""
    metrics: tuple[str, ...] = ()
    """Any of exact_match, bleu, rouge, bertscore, or functions of your own as
    module:function, of (texts, their lists of references), which return a number or a
    dict of them. Each can be metric_for_best_model."""
    bertscore_model: str | None = None
    """Local directory of bertscore's encoder."""
    num_prompts: PositiveInt = 64
    """Taken from the start of the evaluation data, of each set."""
    max_new_tokens: Annotated[PositiveInt | None, TOKENS] = None
    """Length of a continuation. Unset: the model's, or 64."""
    temperature: NonNegative | None = None
    """0: always the most likely token. Unset: the model's if it has do_sample, or 0."""
    top_k: Annotated[NonNegativeInt | None, DRAWN] = None
    """Draw from this many likeliest tokens. 0: off. Unset: the model's, or 0; where it
    has do_sample and no top_k, 50 as in transformers."""
    top_p: Annotated[float | None, Bound(0, 1, open_low=True), DRAWN] = None
    """Draw from the likeliest tokens of this total probability. 1: off. Unset: the
    model's, or 1."""
    batch_size: PositiveInt = 16
    """Prompts at once, over all devices."""
    num_samples_logged: NonNegativeInt = 3
    """Prompts logged with their texts, at each evaluation."""


@dataclass(frozen=True)
class CompilationCacheSection:
    """Compiled programs on disk, so that a run like an earlier one starts sooner.

    Runs may share the folder, and it can be deleted at any time. What is in it runs as
    code: let nobody write there whom you do not trust. A folder that cannot be used is
    a warning. Several processes use one only if all of them see it.
    """

    ONLY_IF: ClassVar = OnlyIf("training.compilation_cache.enabled")

    enabled: bool = True
    """Keep what took 0.1 s or more to compile, and on one device the train step's
    program before it is compiled, so that it need not be traced anew."""
    dir: str | None = None
    """Where, in a folder for each kind of CPU. Unset: as JAX_COMPILATION_CACHE_DIR and
    jax's other settings say, if it is set; else compiled/ in $JAXTRAIN_CACHE or
    ~/.cache/jaxtrain."""
    max_gib: Annotated[Positive, Unit("GiB")] = 5.0
    """Size beyond which the programs not used for longest are removed."""


@dataclass(frozen=True)
class ProfileSection:
    """A trace of some steps, for TensorBoard's profile page and xprof.

    It is written to profile/ in the work directory. Traced steps count in no rate of
    the log.
    """

    start_step: Annotated[PositiveInt | None, STEPS] = None
    """The first step to trace. The first of a start compiles, so begin later. Unset:
    nothing is traced."""
    stop_step: Annotated[PositiveInt | None, STEPS] = None
    """The last step to trace. Unset: five steps are traced."""
    processes: tuple[NonNegativeInt, ...] = (0,)
    """Indices of the processes that trace; every host has at least one."""

    @property
    def enabled(self) -> bool:
        """Whether anything is traced."""
        return self.start_step is not None

    @property
    def steps(self) -> range:
        """The steps to trace; the run may end before the last of them."""
        if self.start_step is None:
            return range(0)
        stop = self.start_step + 4 if self.stop_step is None else self.stop_step
        return range(self.start_step, stop + 1)

    def find_problem(self, last_step: int) -> tuple[str, str] | None:
        """A key that lies after the last step of the run, and what to do about it."""
        for key in ("start_step", "stop_step"):
            if (getattr(self, key) or 0) > last_step:
                return key, f"the run's last step is {last_step}; set it no higher"
        return None


@dataclass(frozen=True)
class LoraSection:
    """Adapters (arXiv:2106.09685)."""

    ONLY_IF: ClassVar = WITH_ADAPTERS

    enabled: bool = DERIVED
    """Train adapters only. training_type lora implies it; sft and dpo may set it."""
    r: Annotated[PositiveInt, NEW_ADAPTERS] = 16
    """Rank of the adapters."""
    lora_alpha: Annotated[PositiveInt, NEW_ADAPTERS] = 32
    """Adapters are scaled by lora_alpha / r."""
    lora_dropout: FractionBelowOne = 0.0
    """Dropout of the adapter's input."""
    target_modules: Annotated[str | tuple[str, ...], NEW_ADAPTERS] = "all-linear"
    """Either "all-linear", a regular expression of whole module names, or a list of
    names such as ["q_proj", "v_proj"]. embed_tokens and lm_head may be among them;
    all-linear leaves them out, as PEFT does. Of Mixtral, Qwen 3 MoE and other families
    whose experts were linear layers in transformers 4, all-linear and the experts' old
    names mean router and experts too, as in PEFT 0.21."""
    target_parameters: Annotated[tuple[str, ...] | None, NEW_ADAPTERS] = None
    """Parameters of a mixture's router and experts that get adapters beside
    target_modules, by the ends of their names: "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj", "mlp.gate.weight" (gpt-oss: "mlp.router.weight"). As in
    PEFT, without lora_dropout and use_dora. Unset: what target_modules says. []: none,
    whatever target_modules says."""
    bias: Annotated[Literal["none", "all", "lora_only"], NEW_ADAPTERS] = "none"
    """Biases that train too."""
    use_rslora: Annotated[bool, NEW_ADAPTERS] = False
    """Scale adapters by lora_alpha / sqrt(r) (arXiv:2312.03732)."""
    modules_to_save: Annotated[tuple[str, ...], NEW_ADAPTERS] = ()
    """Modules trained and saved whole."""
    use_dora: Annotated[bool, NEW_ADAPTERS] = False
    """Train a length for each output besides A B, which then only turns columns
    (arXiv:2402.09353)."""
    init_lora_weights: Annotated[
        Literal["default", "gaussian", "pissa", "olora"], NEW_ADAPTERS
    ] = "default"
    """default: PEFT's, A uniform and B zero; gaussian; pissa (arXiv:2404.02948); olora
    (arXiv:2406.01775). The last two take A B out of the frozen base first; the saved
    adapter fits the base as it was, at twice the rank."""
    rank_pattern: Annotated[dict[str, Any] | None, NEW_ADAPTERS] = None
    """Ranks of modules that differ, by name, such as {"down_proj": 32}. A name is a
    regular expression of a module name's end, and counts alike in all layers."""
    alpha_pattern: Annotated[dict[str, Any] | None, NEW_ADAPTERS] = None
    """The same for lora_alpha."""
    ensure_weight_tying: Annotated[bool, NEW_ADAPTERS] = False
    """Where the head is the embedding: one adapter for both, if either is a target.
    False: each has its own, and the merged model's head is a matrix of its own."""
    quantization: Quantization | None = None
    """QLoRA (arXiv:2305.14314): keep the frozen layers' kernels, experts' too, as nf4
    (4.5 bits a weight) or int8 (8.5 bits), which need jaxtrain[qlora], or fp8 (8 bits,
    not of experts), which is what training.fp8 sets. Unset: in the compute dtype."""
    quantize_experts: Annotated[bool | None, OnlyIf("training.lora.quantization")] = (
        None
    )
    """Whether a mixture's experts are among them; its router never is. Unset: yes."""
    quantization_block_size: Annotated[
        int, Bound(2), OnlyIf("training.lora.quantization")
    ] = 64
    """Inputs that share a scale; even."""
    load_in_4bit: bool = False
    """quantization nf4 by transformers' name."""
    load_in_8bit: bool = False
    """quantization int8 by transformers' name."""
    bnb_4bit_quant_type: Annotated[
        Literal["nf4"], NoEffect("training.lora.quantization names the kind")
    ] = "nf4"
    """The only 4-bit type."""
    init_from: str = ""
    """A directory with a PEFT adapter to start from, such as an earlier run's adapter/,
    on the disk or in a bucket. It brings its own settings; of the keys here, only
    lora_dropout, enabled and those of quantization are read. The DPO reference is the
    base with that adapter."""
    task_type: Annotated[
        Literal["CAUSAL_LM"], NoEffect("training.training_type says what is trained")
    ] = "CAUSAL_LM"
    """The only one."""


@dataclass(frozen=True)
class DpoSection(PreferenceOptions):
    """Direct preference optimization (arXiv:2305.18290).

    The options of the loss, and what acts on the data and on the reference model.
    """

    ONLY_IF: ClassVar = OnlyIf("training.training_type", "dpo")

    beta: Positive = DERIVED
    """Strength of the tie to the reference. Unset: the objective's default, which is
    0.1, for simpo 2.0."""
    max_length: Annotated[int, Bound(2), TOKENS] = DERIVED
    """Length of prompt and completion. Unset: data.max_length, or 1024."""
    max_prompt_length: Annotated[PositiveInt | None, TOKENS] = None
    """The last tokens are kept. Unset: no limit."""
    sync_ref_model: bool = False
    """Move the reference towards the policy (TR-DPO, arXiv:2404.09656): ref = alpha *
    policy + (1 - alpha) * ref every sync steps. Under LoRA the reference then has
    adapters of its own."""
    ref_model_mixup_alpha: Annotated[Fraction, SYNCED] = 0.6
    """alpha of sync_ref_model."""
    ref_model_sync_steps: Annotated[PositiveInt, SYNCED] = 512
    """Steps between moves of sync_ref_model."""


@dataclass(frozen=True)
class MeshSection:
    """Sizes of the device mesh; one may be -1, the devices that remain.

    A resolved run has a -1 only where the number of devices is unknown.
    """

    data: int = DERIVED
    """Copies of the model, each on its own rows. Unset: what remains."""
    fsdp: int = DERIVED
    """Devices that share rows' work and split every parameter (ZeRO 3). Unset: 1; under
    deepspeed.zero_stage 3, what remains."""
    tensor: int = 1
    """Devices that split heads, MLP and vocabulary of one row."""
    context: int = 1
    """Devices that share the tokens of one row, for rows too long for one; each reads
    the keys of the whole row. 1, 2, 4, 8, 16 or 32."""
    expert: int = 1
    """Devices that share out a mixture's experts, each with rows of its own: for all
    other weights they are copies, or split these too under deepspeed.zero_stage 3. See
    model.expert_exchange."""
    stage: int = 1
    """Reserved: a pipeline of layers."""
    dcn_data: PositiveInt | None = None
    """Slices (devices joined by fast links) that data goes over, as part of its size.
    Both unset: all slices present, over data as far as that divides."""
    dcn_fsdp: PositiveInt | None = None
    """The same for fsdp: slower links gather weights."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes by axis name, without `stage` and an `expert` of 1."""
        axes = ["data", "fsdp", "context", "tensor"]
        if self.expert != 1:
            axes.insert(2, "expert")
        return {axis: getattr(self, axis) for axis in axes}

    @property
    def row_shards(self) -> int:
        """Devices that share out a batch's rows; negative where that is unknown."""
        return self.data * self.fsdp * self.expert

    @property
    def slices(self) -> dict[str, int]:
        """Over how many slices an axis goes, where that is set."""
        named = {"data": self.dcn_data, "fsdp": self.dcn_fsdp}
        return {axis: count for axis, count in named.items() if count is not None}


# Text metric -> names of its scores (logged as `eval_<name>`).
TEXT_METRIC_SCORES = {
    "exact_match": ("exact_match",),
    "bleu": ("bleu",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "bertscore": ("bertscore_precision", "bertscore_recall", "bertscore_f1"),
}

# The sections whose keys stand directly under `training`.
TRAINING_SECTIONS: Mapping[str, type] = {
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "precision": PrecisionSection,
    "loop": LoopSection,
    "devices": DevicesSection,
}
# The general keys that have a section of their own under `training`.
NESTED_SECTIONS = {
    "curriculum": CurriculumSection,
    "generation": GenerationSection,
    "compilation_cache": CompilationCacheSection,
    "profile": ProfileSection,
}
PLAIN_SECTIONS = {"model": ModelSection, "data": DataSection, "mesh": MeshSection}


def make_schema() -> schema.Schema:
    """Every key, as a configuration nests them."""
    plain = {name: schema_of(section) for name, section in PLAIN_SECTIONS.items()}
    general: schema.Schema = {}
    for section in TRAINING_SECTIONS.values():
        general |= schema_of(section)
    general |= {name: schema_of(section) for name, section in NESTED_SECTIONS.items()}
    training = {"training_type": schema.Leaf(TrainingType, "sft"), **general}
    blocks = {"lora": schema_of(LoraSection), "dpo": schema_of(DpoSection)}
    for name in get_args(TrainingType):
        is_active = OnlyIf("training.training_type", name)
        training[name] = blocks.get(name, {}) | schema.unset(general, is_active)
    return {**plain, "training": training}


SCHEMA = make_schema()
GENERAL_KEYS = tuple(dotted(SCHEMA["training"]["sft"]))
# What a DERIVED key of `training` is by training_type. LoRA, DPO and SFT: the
# defaults of TRL 1.16. From scratch: what small language models are trained with.
TYPE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    training_type: {
        name: by_type.values[number]
        for name, leaf in dotted(SCHEMA["training"]["sft"]).items()
        for by_type in leaf.all(ByType)
    }
    for number, training_type in enumerate(get_args(TrainingType))
}
# Few new parameters that start at zero bear, and need, a larger step.
LORA_LEARNING_RATES = {"sft": 2e-4, "lora": 2e-4, "dpo": 1e-5}
DEFAULT_MAX_LENGTH = 1024
