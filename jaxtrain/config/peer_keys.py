"""What to write here for an option of TRL, PEFT or transformers that has another name.

Somebody who brings a file or a command of theirs is told of each option what takes its
place, or that nothing need. docs/from_trl.md has the same with the reasons.
"""

from jaxtrain import schema
from jaxtrain.config.sections import SCHEMA

_STRATEGY = (
    "set training.{0}_steps to a number of steps, or to 0 for never; unset, each epoch"
)
_OUTPUT = "give the flag --workdir"
_NEEDLESS = "remove it: {}"
_ALWAYS = _NEEDLESS.format("this is always so here")
_COMPILED = _NEEDLESS.format("every step is compiled here")
_NO_HALTS = _NEEDLESS.format("it is about PyTorch, and nothing here needs it")
_CHECKPOINTING = (
    "training.gradient_checkpointing and training.remat_policy are its keys"
)
_PACKED = "set data.packing: batch packs each micro-batch, true the whole data set"
_PLACES = "set training.deepspeed.zero_stage, or mesh.fsdp"
_OFFLOAD = "set training.gradient_checkpointing, or training.cpu_offload"
_TRUNCATION = _NEEDLESS.format("the beginning of a row is kept")
_TOKENIZER = _NEEDLESS.format("the tokenizer names its special tokens")
_LOGGED = "set training.logging_steps"
_PRECISION = "training.bf16 and training.fp16 are its keys"
_INIT = "each has a key of its own: model.param_dtype, model.attention, model.revision"
_OPTIMIZER = (
    "set training.optimizer (adamw, adafactor, lion, muon, sgd), and for 8-bit kinds"
    " training.moment_dtype = 'int8'"
)
_RPO = (
    "set training.dpo.loss_type = ['sigmoid', 'sft'] and training.dpo.loss_weights ="
    " [1.0, alpha]"
)
_KTO = "set training.objective = 'kto' and training.objective_kwargs = {{{}: ...}}"
_REFERENCE = _NEEDLESS.format("the reference is the model at the start of the run")

# Options of theirs whose name has no key here, or the key of something else.
ADVICE: dict[str, str] = {
    # --- the model
    "model_name_or_path": "set model.name_or_path, or give the flag --model",
    "model_revision": "set model.revision",
    "tokenizer_name": "set model.tokenizer_name_or_path",
    "dtype": f"set model.param_dtype for trained weights; {_PRECISION}",
    "torch_dtype": f"set model.param_dtype for trained weights; {_PRECISION}",
    "attn_implementation": "set model.attention; unset, the fastest is chosen",
    "use_flash_attention_2": "set model.attention; unset, the fastest is chosen",
    "model_init_kwargs": _INIT,
    "ref_model_init_kwargs": _REFERENCE,
    "force_use_ref_model": _REFERENCE,
    "model_adapter_name": _REFERENCE,
    "ref_adapter_name": _REFERENCE,
    "use_liger_kernel": _NEEDLESS.format("the loss never holds all logits"),
    "use_liger_loss": _NEEDLESS.format("the loss never holds all logits"),
    "liger_kernel_config": _NEEDLESS.format("the loss never holds all logits"),
    "use_cache": _ALWAYS,
    "disable_dropout": _NEEDLESS.format("base models are run without dropout"),
    # --- adapters
    "use_peft": "set training.lora.enabled",
    "lora_r": "set training.lora.r",
    "lora_target_modules": "set training.lora.target_modules",
    "lora_target_parameters": "set training.lora.target_parameters",
    "lora_modules_to_save": "set training.lora.modules_to_save",
    "lora_task_type": "remove it, or set training.lora.task_type",
    "lora_bias": "set training.lora.bias",
    "peft_config": "set the keys of training.lora",
    "use_bnb_nested_quant": "remove it: scales stay in float32",
    "bnb_4bit_use_double_quant": "remove it: scales stay in float32",
    "bnb_4bit_quant_storage": _NO_HALTS,
    "bnb_4bit_compute_dtype": _PRECISION,
    # --- rows
    "dataset_name": "set data.train",
    "dataset_config": "download the configuration, and set data.train to its folder",
    "dataset_train_split": "set data.train_split",
    "dataset_test_split": "set data.eval_split",
    "dataset_streaming": "set data.streaming",
    "datasets": "set data.train to a list of {path, weight}",
    "dataset_mixer": "set data.train to a list of {path, weight}",
    "test_split_size": "set data.eval to a file of the held-out rows",
    "dataset_text_field": "set data.text_column",
    "dataset_kwargs": "each has a key of its own, such as data.format",
    "dataset_batch_size": _NEEDLESS.format("rows are tokenized in chunks"),
    "preprocessing_num_workers": "set data.dataset_num_proc",
    "skip_prepare_dataset": _NEEDLESS.format("rows of input_ids are taken as they are"),
    "max_seq_length": "set data.max_length",
    "max_completion_length": "set training.dpo.max_length and max_prompt_length",
    "max_target_length": "set training.dpo.max_length and max_prompt_length",
    "truncation_mode": _TRUNCATION,
    "packing_strategy": _PACKED,
    "eval_packing": "set data.packing, which is for both",
    "padding_free": _PACKED,
    "pad_to_multiple_of": _NEEDLESS.format("rows are padded to shapes that suit it"),
    "shuffle_dataset": "set data.shuffle",
    "train_sampling_strategy": "set data.shuffle",
    "group_by_length": "remove it: data.packing keeps padding small",
    "length_column_name": "remove it: data.packing keeps padding small",
    "chat_template_path": "set data.chat_template",
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "label_pad_token_id": _TOKENIZER,
    "padding_value": _TOKENIZER,
    "remove_unused_columns": "remove it: columns that nothing reads are left out",
    "label_names": _ALWAYS,
    "dataloader_drop_last": "remove it: no row is dropped",
    "dataloader_prefetch_factor": "set training.dataloader_num_workers",
    "dataloader_persistent_workers": _ALWAYS,
    "dataloader_multiprocessing_context": _ALWAYS,
    "dataloader_in_order": _ALWAYS,
    # --- losses
    "rpo_alpha": _RPO,
    "desirable_weight": _KTO.format("desirable_weight"),
    "undesirable_weight": _KTO.format("undesirable_weight"),
    "cpo_alpha": _KTO.replace("kto", "cpo").format("cpo_alpha"),
    "simpo_gamma": _KTO.replace("kto", "simpo").format("simpo_gamma"),
    "precompute_ref_batch_size": "set training.per_device_eval_batch_size",
    "generate_during_eval": "set training.generation.enabled",
    "predict_with_generate": "set training.generation.enabled",
    "label_smoothing_factor": "set training.dpo.label_smoothing, or a loss of your own",
    "average_tokens_across_devices": _ALWAYS,
    # --- optimizer and precision
    "optim": _OPTIMIZER,
    "optim_args": "each has a key of its own, such as training.momentum",
    "optim_target_modules": "set training.lr_multipliers",
    "lr_scheduler_kwargs": "set training.lr_scheduler_kwargs",
    "lr": "set training.learning_rate",
    "max_norm": "set training.max_grad_norm",
    "tf32": _NO_HALTS,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "fp16_opt_level": _PRECISION,
    "half_precision_backend": _PRECISION,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "activation_offloading": _OFFLOAD,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "torch_empty_cache_steps": _NO_HALTS,
    "auto_find_batch_size": "set training.per_device_train_batch_size",
    # --- the run
    "output_dir": _OUTPUT,
    "overwrite_output_dir": "remove it: give a new --workdir to begin anew",
    "logging_dir": _OUTPUT,
    "logging_strategy": _LOGGED,
    "logging_first_step": _LOGGED,
    "logging_nan_inf_filter": "set training.on_nonfinite",
    "log_level": _NO_HALTS,
    "log_level_replica": _NO_HALTS,
    "log_on_each_node": _NO_HALTS,
    "disable_tqdm": _NO_HALTS,
    "include_num_input_tokens_seen": _ALWAYS,
    "include_tokens_per_second": _ALWAYS,
    "eval_strategy": _STRATEGY.format("eval"),
    "evaluation_strategy": _STRATEGY.format("eval"),
    "save_strategy": _STRATEGY.format("save"),
    "do_train": "remove it: a run trains",
    "do_eval": _STRATEGY.format("eval"),
    "do_predict": "remove it: `jaxtrain generate` writes texts",
    "eval_delay": "remove it: evaluations begin with the first of training.eval_steps",
    "eval_accumulation_steps": _NO_HALTS,
    "eval_do_concat_batches": _NO_HALTS,
    "eval_use_gather_object": _NO_HALTS,
    "prediction_loss_only": _NO_HALTS,
    "include_for_metrics": "set training.row_metrics, or training.generation.metrics",
    "batch_eval_metrics": "set training.row_metrics, or training.generation.metrics",
    "compute_metrics": "set training.row_metrics, or training.generation.metrics",
    "save_only_model": "remove it: a checkpoint is whole, so that a run can resume",
    "save_safetensors": _ALWAYS,
    "save_on_each_node": _NO_HALTS,
    "enable_jit_checkpoint": "remove it: SIGTERM saves a checkpoint",
    "restore_callback_states_from_checkpoint": _ALWAYS,
    "ignore_data_skip": "remove it: a resumed run goes on with the next batch at once",
    "data_seed": "set training.seed",
    "use_cpu": "set the environment's JAX_PLATFORMS=cpu",
    "no_cuda": "set the environment's JAX_PLATFORMS=cpu",
    "project": "set the environment's WANDB_PROJECT",
    "hub_model_id": "set training.push_to_hub = 'owner/name'",
    "hub_token": "remove it: log in with `hf auth login`, or set HF_TOKEN",
    "hub_strategy": "set training.push_to_hub",
    "hub_private_repo": "set training.push_to_hub",
    "hub_always_push": "set training.push_to_hub",
    "hub_revision": "set training.push_to_hub",
    "trackio_space_id": "set training.report_to",
    "trackio_bucket_id": "set training.report_to",
    "trackio_static_space_id": "set training.report_to",
    # --- devices
    "deepspeed": _PLACES,
    "fsdp": _PLACES,
    "fsdp_config": _PLACES,
    "accelerator_config": _PLACES,
    "parallelism_config": _PLACES,
    "ddp_backend": _NO_HALTS,
    "ddp_timeout": "set training.step_timeout_secs",
    "ddp_bucket_cap_mb": _NO_HALTS,
    "ddp_broadcast_buffers": _NO_HALTS,
    "ddp_find_unused_parameters": _NO_HALTS,
    "ddp_static_graph": _NO_HALTS,
    "local_rank": _NO_HALTS,
    "ignore_bias_buffers": _NO_HALTS,
    "skip_memory_metrics": _NO_HALTS,
    "debug": "give the flag --debug, which shows the traceback of an error",
}


def advice(name: str) -> str:
    """What to write for an option of theirs, as a key or as a flag; "" if unknown."""
    return ADVICE.get(name.removeprefix("--").replace("-", "_"), "")


def suggest(name: str, prefix: str, section: schema.Schema) -> str:
    """What to do about an unknown key: of their names what we write, else a near one.

    Args:
        prefix: of the section's keys, with its dot; "" outside of all sections.
    """
    return advice(name) or schema.suggest_key(name, prefix, section, SCHEMA)
