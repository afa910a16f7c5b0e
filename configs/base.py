"""Every key of a configuration: its default, unit and allowed values.

Other files change this one's values; it only runs by being changed itself. Override
any key on the command line: `--config.training.learning_rate=1e-4`, a list as
`--config.training.report_to=wandb,jsonl`, a section as
`--config.training.deepspeed="{'zero_stage': 3}"`.

A key whose value is `unset(type)` is left to a default that its comment names.
`jaxtrain.config` checks every value, and reports all problems of a run at once.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

Section = dict[str, Any]
unset = config_dict.placeholder  # None until set, then of that type


def several(default: Any) -> FieldReference:
    """A key that holds a list, or one of several types."""
    return FieldReference(default, field_type=object)


def get_config() -> ConfigDict:
    """The configuration with every key at its default."""
    return ConfigDict(
        {"model": model(), "data": data(), "training": training(), "mesh": mesh()}
    )


def model() -> Section:
    return {
        # A local Hugging Face directory or a hub name. "": the model that comes with
        # jaxtrain. from_scratch takes only its sizes and its tokenizer; "": those of
        # `architecture`.
        "name_or_path": "",
        # Where the tokenizer is, if not with the model; "" with `architecture`: the
        # one that comes with jaxtrain.
        "tokenizer_name_or_path": "",
        # Branch, tag or commit on the hub; unset: the default branch.
        "revision": unset(str),
        # Let a hub repository's own code run to load its tokenizer.
        "trust_remote_code": False,
        # Attention kernel: auto | reference | xla | cudnn | pallas_gpu |
        # pallas_triton | pallas_tpu. auto: the fastest measured that takes the shapes;
        # the log says which.
        "attention": "auto",
        # How trained parameters are kept: float32 | bfloat16. The compute dtype is
        # training.bf16 / fp16, and LoRA's frozen base and DPO's reference are kept in
        # it. Adapters are float32 always.
        "param_dtype": "float32",
        # How weights are exported: float32 | bfloat16 | float16; unset: as they are
        # kept.
        "export_dtype": unset(str),
        # Tokens whose logits exist at once in the loss: memory against speed. Unset:
        # 512, less for models narrower than 1280.
        "loss_chunk_tokens": unset(int),
        # Compile one layer for all of them. False compiles each: on a GPU 4% faster
        # with 9% less memory (3B, no rematerialization), compiled in 22 s, not 11.
        "scan_layers": True,
        # Sizes for from_scratch, by the names of a Hugging Face config.json.
        "architecture": {
            # llama | qwen2 | qwen3 | mistral | gemma2 | gemma3_text | phi3 | mixtral |
            # qwen3_moe
            "model_type": "llama",
            "vocab_size": unset(int),  # unset: the tokenizer's
            "hidden_size": 128,
            "intermediate_size": 384,  # width of the MLP
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": unset(int),  # unset: hidden_size / num_attention_heads
            # silu | gelu | gelu_pytorch_tanh; unset: the model_type's, here and below
            "hidden_act": unset(str),
            "hidden_activation": unset(str),  # hidden_act's name in Gemma
            "max_position_embeddings": 4096,  # tokens
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            # {"rope_type": "llama3" | "linear" | "yarn", ...} as in config.json
            "rope_scaling": several(None),
            "rope_local_base_freq": unset(float),  # Gemma 3: theta of sliding layers
            "partial_rotary_factor": unset(float),  # Phi-3: share of head_dim rotated
            "original_max_position_embeddings": unset(int),  # Phi-3: before scaling
            "tie_word_embeddings": True,
            "attention_bias": unset(bool),
            "mlp_bias": unset(bool),
            "sliding_window": unset(int),  # tokens that a sliding layer reads
            # ["sliding_attention" | "full_attention", ...], one a layer
            "layer_types": several(None),
            "sliding_window_pattern": unset(int),  # Gemma: every so many-th is full
            "use_sliding_window": unset(bool),  # Qwen
            "max_window_layers": unset(int),  # Qwen: layers before the first sliding
            "attn_logit_softcapping": unset(float),  # Gemma 2
            "final_logit_softcapping": unset(float),  # Gemma 2
            "query_pre_attn_scalar": unset(float),  # Gemma: attention scale ** -2
            "num_experts": unset(int),  # mixtral, qwen3_moe: MLPs in each layer
            "num_experts_per_tok": unset(int),  # of these, how many a token goes to
            "moe_intermediate_size": unset(int),  # qwen3_moe: width of one expert
            # qwen3_moe: let the weights of a token's experts sum to 1
            "norm_topk_prob": unset(bool),
            "router_aux_loss_coef": unset(float),  # training's, where that is unset
            "initializer_range": 0.02,  # standard deviation of new weights
        },
    }


def data() -> Section:
    return {
        # A file (jsonl, json, parquet, csv, arrow, txt), a folder of them, or a hub
        # name. "": the data that comes with jaxtrain, of the kind training_type needs.
        # A mixture: "a.jsonl:0.7,b.jsonl:0.3", or a list of {"path", "weight"}. The
        # weights are the shares of rows (packing: of packed rows) in each epoch, which
        # is as long as all data sets together; rows repeat, or wait for a later epoch.
        "train": several(""),
        # Likewise. "": the embedded held-out rows if `train` is "" too, else
        # `eval_split` of `train`.
        "eval": "",
        "train_split": "train",
        "eval_split": unset(str),  # unset: no split to evaluate on
        # auto (by the columns) | text | prompt_completion | messages | preference |
        # labeled (prompt, completion, label: for KTO)
        "format": "auto",
        "text_column": "text",  # the column of format text
        # Tokens of a row, prompt and completion together. Unset: 1024, or the end of
        # an enabled curriculum; dpo: training.dpo.max_length.
        "max_length": unset(int),
        # Several documents or pairs a row, each blind to the others. Unset: only
        # from_scratch.
        "packing": unset(bool),
        # Preference rows: compute each prompt once, its two completions behind it in
        # one row, each blind to the other. The same numbers with fewer tokens; packed,
        # a row holds up to 2 * max_length of them.
        "share_prompts": False,
        "shuffle": True,  # anew each epoch, from training.seed
        # error | skip: a row that is malformed, or has nothing to train on.
        "on_bad_row": "error",
        # Train on completions, not prompts. Unset: wherever rows have prompts.
        "completion_only_loss": unset(bool),
        "assistant_only_loss": False,  # messages: train on assistant turns only
        # Jinja template, or a file of one. Unset: the tokenizer's.
        "chat_template": unset(str),
        "max_train_rows": unset(int),  # the first so many; unset: all
        "max_eval_rows": unset(int),  # the first so many; unset: all
        # Read training rows as they are needed, never all of them: for data larger than
        # the disk's or the hub's patience. Rows are checked as they come; max_steps
        # must be given; rows are as long as max_length, so pack where you can.
        # Evaluation rows are not streamed.
        "streaming": False,
        # Streaming: rows shuffled together, over all devices; at least a window on
        # each.
        "shuffle_buffer_size": 10_000,
        # Streaming: rows tokenized, and packed best-fit, together.
        "stream_window_rows": 1000,
        # Keep token ids on disk, by a hash of data, tokenizer and options, and map
        # them into memory: later runs and other processes need not tokenize. Streamed
        # rows are never kept.
        "cache": True,
        "cache_dir": unset(str),  # unset: $JAXTRAIN_CACHE, or ~/.cache/jaxtrain
    }


def training() -> Section:
    """The general keys, and a block for each training_type.

    A block overrides general keys for its training_type: training.dpo.learning_rate is
    DPO's. What another type's block says is not read, and the log says so.
    """
    general = hyperparameters()
    return {
        "training_type": "sft",  # from_scratch | sft | lora | dpo
        **general,
        "from_scratch": all_unset(general),
        "sft": all_unset(general),
        "lora": {**lora(), **all_unset(general)},
        "dpo": {**dpo(), **all_unset(general)},
    }


def hyperparameters() -> Section:
    """The general keys. "By type" is, unless a training_type is named, for all others:

                       from_scratch   sft      lora     dpo
    learning_rate      3e-4           2e-5     2e-4     1e-6 (1e-5 with lora.enabled)
    num_train_epochs   1              3        3        3
    weight_decay       0.1            0        0        0
    adam_beta2         0.95           0.999    0.999    0.999
    lr_scheduler_type  cosine         linear   linear   linear
    warmup_ratio       0.01           0        0        0

    sft with lora.enabled has lora's learning_rate.
    """
    return {
        # --- optimizer ---
        "optimizer": "adamw",  # adamw | adafactor | lion | muon | sgd
        "learning_rate": unset(float),  # the peak; unset: by type
        "weight_decay": unset(float),  # not on norms and biases; unset: by type
        "adam_beta1": 0.9,  # adamw and lion
        "adam_beta2": unset(float),  # adamw and lion; unset: by type
        "adam_epsilon": 1e-8,
        "momentum": unset(float),  # sgd (unset: 0) and muon (unset: 0.95)
        "max_grad_norm": 1.0,  # global norm gradients are clipped to; 0: never
        # --- schedule ---
        # linear | cosine | cosine_with_restarts | cosine_with_min_lr | polynomial |
        # constant | constant_with_warmup | inverse_sqrt | wsd | warmup_stable_decay
        # (wsd's other name), each as in transformers. Unset: by type.
        "lr_scheduler_type": unset(str),
        "warmup_steps": unset(int),  # optimizer steps; > 0 overrules warmup_ratio
        "warmup_ratio": unset(float),  # of all steps, in [0, 1]; unset: by type
        # Each belongs to the schedules named; unset: transformers' default.
        "lr_scheduler_kwargs": {
            "num_cycles": unset(float),  # cosine*, wsd
            "power": unset(float),  # polynomial
            "lr_end": unset(float),  # polynomial: the last learning rate
            "min_lr": unset(float),  # cosine_with_min_lr: the last learning rate
            "min_lr_rate": unset(float),  # the same, as a share of learning_rate
            "timescale": unset(int),  # inverse_sqrt, in steps
            "num_decay_steps": unset(int),  # wsd; unset: a tenth of the run
            "num_stable_steps": unset(int),  # wsd; unset: what remains
            "warmup_type": unset(str),  # wsd: linear | cosine | 1-sqrt
            "decay_type": unset(str),  # wsd: linear | cosine | 1-sqrt
            "min_lr_ratio": unset(float),  # wsd: last / peak learning rate
        },
        # --- precision and memory ---
        "fp16": False,  # float16 compute with dynamic loss scaling
        "bf16": unset(bool),  # bfloat16 compute; unset: not fp16. Both off: float32
        "gradient_checkpointing": False,  # compute activations again in backward
        # What is computed again: full (all of a layer) | offload (that, from an input
        # in pinned host memory) | dots (all but matrix products) | dots_no_batch (all
        # but products with weights) | save_attention (all but attention) | minimal
        # (only what is cheap).
        "remat_policy": "full",
        # --- loop ---
        "num_train_epochs": unset(float),  # unset: by type
        "max_steps": -1,  # optimizer steps; > 0 overrules num_train_epochs
        "per_device_train_batch_size": 8,  # rows (dpo: pairs) of a micro-batch
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,  # micro-batches an optimizer step
        "seed": 42,  # of new weights, data order and dropout
        "eval_steps": unset(int),  # steps; 0: never; unset: after each epoch
        "eval_on_start": False,  # evaluate before the first step
        "save_steps": unset(int),  # steps; 0: never; unset: after each epoch
        "save_total_limit": unset(int),  # checkpoints kept; unset: all
        "save_final_model": True,  # export in Hugging Face's format at the end
        "logging_steps": 10,  # steps
        # Any of tensorboard, wandb, jsonl; or none.
        "report_to": several(("tensorboard", "jsonl")),
        "run_name": unset(str),  # unset: the work directory's name
        "metric_for_best_model": "eval_loss",  # as the log names it
        # Unset: false for a name that ends in loss, perplexity or kl.
        "greater_is_better": unset(bool),
        "load_best_model_at_end": False,  # export the best checkpoint, not the last
        # Evaluations without improvement before stopping; unset: never stop.
        "early_stopping_patience": unset(int),
        "early_stopping_threshold": 0.0,  # least change that counts as improvement
        # auto: continue from the last checkpoint in the work directory, if there is
        # one | never: refuse to write over it.
        "resume_from_checkpoint": "auto",
        "use_auxiliary_loss": False,  # add a TrainingOrchestrator subclass's loss
        # Weight of a mixture of experts' load-balancing loss (the metric aux_loss);
        # unset: the model's own config says. 0: off. Refused for other models.
        "router_aux_loss_coef": unset(float),
        # auto (next_token; dpo: preference) | orpo | cpo | simpo | kto, all of
        # training_type dpo | module:function, your own: see jaxtrain.objectives.
        "objective": "auto",
        # Its keyword arguments. Of training.dpo, beta and label_smoothing go to an
        # objective that takes them; each may be set in one place only.
        "objective_kwargs": several(None),
        # Seconds without a finished step, evaluation batch or save after which the
        # process ends with all its stacks: a hang becomes an error. 0: never.
        "step_timeout_secs": 1800.0,
        # --- when a step goes wrong; its batch is saved in bad_batches/ ---
        # A gradient that is not finite: error (stop and name the step) | skip (leave
        # the weights as they were). fp16 skips such steps anyway, to find its scale.
        "on_nonfinite": "error",
        "on_spike": "error",  # the same for a spike of the loss
        # A spike lies this many standard deviations above the mean of the last
        # spike_window losses; unset: none is looked for.
        "spike_threshold": unset(float),
        "spike_window": 50,  # optimizer steps
        # grad_norm/embed, attention, mlp, norm, head, lora beside grad_norm.
        "log_grad_norm_by_group": False,
        # --- generation: continue held-out prompts at each evaluation ---
        "generation": {
            "enabled": unset(bool),  # unset: whether metrics are named
            # Any of exact_match, bleu, rouge, bertscore, or functions of your own as
            # module:function, of (texts, their lists of references), which return a
            # number or a dict of them. Each can be metric_for_best_model.
            "metrics": several(()),
            "bertscore_model": unset(str),  # local directory of bertscore's encoder
            "num_prompts": 64,  # the first so many rows of the evaluation data
            "max_new_tokens": 64,
            "temperature": 0.0,  # 0: the most likely token
            "top_k": 0,  # 0: off
            "top_p": 1.0,  # 1: off
            "batch_size": 16,  # prompts at once, over all devices
            "num_samples_logged": 3,  # prompts with their texts, at each evaluation
        },
        # --- devices: names of PyTorch's world; the log says what each became ---
        # One mesh spans the devices of all processes, which the launcher's
        # environment names: several processes need no key. Kept for the log.
        "distributed": False,
        "num_gpus": unset(int),  # devices to use; unset: all; too many: an error
        "dataloader_num_workers": 0,  # processes that prepare rows; 0: this one
        # Copy the next batch to the devices while they compute. pin_memory is the
        # same key by DeepSpeed's name; unset: true.
        "dataloader_pin_memory": unset(bool),
        "pin_memory": unset(bool),
        "cpu_offload": False,  # both deepspeed.offload_* at once
        "deepspeed": {
            # What is split over devices. 0: nothing | 1, 2: optimizer state (XLA
            # scatters gradients in either) | 3: parameters too, over mesh.fsdp.
            # Unset: 3 if mesh.fsdp is above 1, else 0.
            "zero_stage": unset(int),
            # Keep it in pinned host memory between steps. Unset: cpu_offload's value.
            "offload_optimizer": unset(bool),
            "offload_param": unset(bool),
        },
        # --- curriculum: from short or easy rows to all, over `steps` steps ---
        "curriculum": {
            "enabled": False,
            "strategy": "length_based",  # length_based | difficulty_based
            # length_based: rows of at most so many tokens. difficulty_based: the
            # easiest share of rows, start_length / end_length.
            "start_length": 128,
            "end_length": unset(int),  # tokens; unset: data.max_length
            "steps": 1000,  # optimizer steps
            # Levels that the limit counts in, evenly spaced on a logarithmic scale.
            # Each is one length of batches, so one compilation at most.
            "num_buckets": 5,
            # difficulty_based: the column of numbers that tells how hard a row is.
            # Unset: the model's own loss before training; dpo: how much less likely
            # a token of the chosen completion is to it than one of the rejected.
            "column": unset(str),
        },
    }


def lora() -> Section:
    return {
        # Train adapters only; training_type lora implies it, sft and dpo may set it.
        "enabled": unset(bool),
        "r": 16,  # rank
        "lora_alpha": 32,  # adapters count lora_alpha / r
        "lora_dropout": 0.0,  # in [0, 1), of the adapter's input
        # "all-linear", a regular expression of whole module names, or a list of
        # names such as ["q_proj", "v_proj"]. embed_tokens and lm_head may be among
        # them; all-linear leaves them out, as PEFT does.
        "target_modules": several("all-linear"),
        "bias": "none",  # none | all | lora_only: biases that train too
        "use_rslora": False,  # count lora_alpha / sqrt(r) (arXiv:2312.03732)
        "modules_to_save": several(()),  # modules trained and saved whole
        # Train a length for each output beside A B, which then turns columns only
        # (arXiv:2402.09353).
        "use_dora": False,
        # default (PEFT's: A uniform, B zero) | gaussian | pissa (arXiv:2404.02948) |
        # olora (arXiv:2406.01775). The last two take A B out of the frozen base first;
        # the adapter saved fits the base as it was, at twice the rank.
        "init_lora_weights": "default",
        # {name: rank} and {name: alpha} of modules that differ, such as
        # {"down_proj": 32}. Regular expressions of a name's end, alike in all layers.
        "rank_pattern": several(None),
        "alpha_pattern": several(None),
        # Where the head is the embedding: one adapter for both, if either is a target.
        # False: each its own, and the merged model's head is a matrix of its own.
        "ensure_weight_tying": False,
        # QLoRA (arXiv:2305.14314): keep the frozen layers' kernels as nf4 (4.5 bits a
        # weight) or int8 (8.5 bits). Needs jaxtrain[qlora]. Unset: in the compute
        # dtype.
        "quantization": unset(str),
        "quantization_block_size": 64,  # inputs that share a scale; even
        # The same by transformers' names: nf4, int8, and the only 4-bit type.
        "load_in_4bit": False,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        # A directory with a PEFT adapter to start from, such as an earlier run's
        # adapter/. It brings its own settings; of the keys here, only lora_dropout
        # and enabled are read. The DPO reference is the base with that adapter.
        "init_from": "",
        "task_type": "CAUSAL_LM",  # the only one
    }


def dpo() -> Section:
    return {
        # Strength of the tie to the reference. Unset: the objective's default, which is
        # 0.1, for simpo 2.0.
        "beta": unset(float),
        # One or a list of sigmoid | hinge | ipo | exo_pair | nca_pair | robust |
        # bco_pair | sppo_hard | aot | aot_unpaired | apo_zero | apo_down |
        # discopop | sft | sigmoid_norm.
        "loss_type": several(("sigmoid",)),
        "loss_weights": several(None),  # a number for each loss_type; unset: 1
        # In [0, 1), of robust in [0, 0.5): robust, exo_pair, aot, aot_unpaired.
        "label_smoothing": 0.0,
        "conservative_smoothing": 0.0,  # in [0, 0.5): sigmoid (cDPO)
        "discopop_tau": 0.05,  # discopop
        # Tokens of prompt and completion. Unset: data.max_length, or 1024.
        "max_length": unset(int),
        "max_prompt_length": unset(int),  # tokens, the last kept; unset: no limit
        "reference_free": False,  # the reference is uniform: no second model
        # Once, before training, into <workdir>/reference; frees the reference's memory.
        "precompute_ref_log_probs": False,
        # reverse_kl | forward_kl | js_divergence | alpha_divergence
        # (arXiv:2309.16240)
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,  # alpha_divergence
        # In [0, 1]: weight of the tokens beyond the shorter completion
        # (LD-DPO, arXiv:2409.06411); unset: 1.
        "ld_alpha": unset(float),
        "use_weighting": False,  # weigh pairs by likelihood (WPO, arXiv:2406.11827)
        # Move the reference towards the policy (TR-DPO, arXiv:2404.09656):
        # ref = alpha * policy + (1 - alpha) * ref every sync steps. Under LoRA the
        # reference then has adapters of its own.
        "sync_ref_model": False,
        "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512,
    }


def mesh() -> Section:
    """Sizes of the device mesh; one may be -1, the devices that remain."""
    return {
        # Copies of the model, each on its own rows. Unset: what remains.
        "data": unset(int),
        # Devices that share rows' work and split every parameter (ZeRO 3). Unset: 1;
        # under deepspeed.zero_stage 3, what remains.
        "fsdp": unset(int),
        "tensor": 1,  # devices that split heads, MLP and vocabulary of one row
        # Devices that share the tokens of one row, for rows too long for one; each
        # reads the keys of the whole row. 1, 2, 4, 8, 16 or 32.
        "context": 1,
        "expert": 1,  # reserved: a mixture's experts are split over fsdp
        "stage": 1,  # reserved: a pipeline of layers
        # Slices (devices joined by fast links) that data goes over, as part of its
        # size. Both unset: all slices present, over data as far as that divides.
        "dcn_data": unset(int),
        "dcn_fsdp": unset(int),  # the same for fsdp: slower links gather weights
    }


def all_unset(section: Section) -> Section:
    """The same keys, all unset."""
    blank: Section = {}
    for name, value in section.items():
        if isinstance(value, dict):
            blank[name] = all_unset(value)
        else:
            is_reference = isinstance(value, FieldReference)
            blank[name] = unset(value.get_type() if is_reference else type(value))
    return blank
