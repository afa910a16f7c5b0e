"""What `bash tests/run.sh fast` leaves out beside the tests marked as long.

And what CI's second Python runs again, for it has another jax, flax and numpy.

A contributor runs the fast tests while working. They touch every module of the package,
as `fast_test.py` shows; what is left out here repeats that with more compilation, more
processes or more variants.
"""

# Markers of pytest whose tests are not fast.
MARKERS = ("slow", "torch", "gpu", "on_request")
# Files, or tests by the beginning of their name, below tests/.
LEFT_OUT = (
    # Each starts processes, trains on several devices, or compiles much.
    "aot_test.py::test_every_kind_of_batch",
    "aot_test.py::test_the_help_says",
    "aot_test.py::test_the_search_compiles",
    "aot_test.py::test_the_search_shares",
    "balance_test.py::test_meshes_accumulation",
    "base_weights_test.py::test_a_run_on_replaced",
    "base_weights_test.py::test_the_adapter_of_a_reference",
    "base_weights_test.py::test_whole_training",
    "batch_packing_test.py::test_a_shared_prompt_counts_twice",
    "batch_packing_test.py::test_difficulty_is_that",
    "batch_packing_test.py::test_packed_examples_have_the_numbers",
    "bucket_checkpoint_test.py::test_a_damaged_step",
    "bucket_checkpoint_test.py::test_a_step_without_its",
    "bucket_checkpoint_test.py::test_saves_restores_and_keeps",
    "bucket_commands_test.py::test_every_command",
    "bucket_data_test.py::test_faults_in_a_stream",
    "bucket_lock_test.py::test_of_many_that_find",
    "bucket_models_test.py::test_faults_are_tried",
    "bucket_runs_test.py",
    "checkpoint_test.py::test_a_kill_in_mid_save",
    "checkpoint_test.py::test_the_state_may_be_donated",
    "checkpoint_test.py::test_two_processes_save",
    # Each needs a run that is trained for it.
    "commands_test.py::test_a_folder_is_told",
    "commands_test.py::test_a_run_is_used_on_other_devices",
    "commands_test.py::test_a_stream_makes",
    "commands_test.py::test_an_exported_checkpoint",
    "commands_test.py::test_eval_of",
    "commands_test.py::test_eval_refuses",
    "commands_test.py::test_eval_repeats",
    "commands_test.py::test_generate_draws",
    "commands_test.py::test_other_commands_refuse",
    "commands_test.py::test_the_commands_run",
    "commands_test.py::test_the_harness_takes",
    "compilation_cache_test.py::test_a_run_imports_no_other",
    "compilation_cache_test.py::test_processes_of_a_run",
    "context_test.py",
    "curriculum_test.py::test_without_a_curriculum",
    "data/layout_test.py::test_every_example_is_in_one_row",
    "data/mixture_test.py::test_each_epoch_has_its_shares",
    "data/stream_batches_test.py::test_packed_micro",
    "data/workers_test.py::test_processes_change_nothing",
    "diagnostics_test.py::test_a_loss_is_logged",
    "diagnostics_test.py::test_a_nan_is_skipped",
    "diagnostics_test.py::test_a_nan_stops_the_run",
    "diagnostics_test.py::test_fp16_ends",
    "diagnostics_test.py::test_fp16_names",
    "diagnostics_test.py::test_skipping_keeps",
    "docs_test.py::test_every_command_of_the_page_runs",
    "documented_interface_test.py",
    "eval_sets_test.py::test_a_set_stops_early",
    "eval_sets_test.py::test_sets_have_the_numbers",
    "exact_records_test.py::test_a_finished_run",
    "exact_records_test.py::test_a_window_survives",
    "exact_records_test.py::test_an_early_stop_is_final",
    "exact_records_test.py::test_evaluations_that_are_no_numbers",
    "expert_adapters_test.py::test_experts_in_few_bits",
    "expert_adapters_test.py::test_no_expert_has",
    "expert_parallel_test.py",
    "faults/faults_test.py::test_a_damaged_checkpoint",
    "faults/faults_test.py::test_a_disk_that_is_full",
    "faults/faults_test.py::test_a_flipped_bit",
    "faults/faults_test.py::test_a_run_goes_on",
    "faults/faults_test.py::test_a_run_that_is_killed",
    "faults/faults_test.py::test_two_processes",
    "faults/fuzz_test.py::test_no_bad_input",
    "fitted_step_test.py::test_a_run_takes",
    "fitted_step_test.py::test_the_report_ahead",
    "flags_test.py::test_a_flag_acts",
    "fp8_step_test.py::test_a_reference_in_codes",
    "fp8_step_test.py::test_gradients_of_a_step",
    "fp8_step_test.py::test_kernels_quantized_before",
    "fp8_step_test.py::test_over_a_mesh",
    "fp8_step_test.py::test_runs_train_with_a_frozen_model",
    "generate_test.py::test_texts_come_in_the_order",
    "generate_test.py::test_top_k_of_one",
    "kept_programs_test.py::test_a_second_start_traces_nothing",
    "kept_programs_test.py::test_steps_that_are_read",
    "kept_programs_test.py::test_what_was_logged",
    "kernels/attention/attention_test.py::test_a_packed_row_equals",
    "kernels/attention/attention_test.py::test_a_schedule_made_once",
    "kernels/attention/attention_test.py::test_a_shared_prompt_equals",
    "kernels/attention/attention_test.py::test_nan_in_padding",
    "kernels/attention/attention_test.py::test_output_and_gradients",
    "kernels/attention/attention_test.py::test_xla_agrees",
    "kernels/attention/lowering_test.py::test_hopper_kernels_lower",
    "kernels/attention/partition_test.py::test_values_and_gradients",
    "kernels/attention/schedule_test.py::test_random_ids",
    "kernels/linear_cross_entropy/api_test.py::test_any_size",
    "kernels/linear_cross_entropy/api_test.py::test_outputs_and_gradients_equal_float64",
    "main_test.py",
    "mistakes_test.py::test_a_loss_that_is_no_number",
    "mistakes_test.py::test_a_platform_that_is_not_there",
    "mistakes_test.py::test_a_run_that_ends_early",
    "models/families_test.py::test_the_page_has",
    "models/layer_kinds_test.py::test_eight_devices",
    "models/layer_kinds_test.py::test_how_layers_are_run",
    "models/layer_kinds_test.py::test_packed_documents_learn",
    "models/layer_kinds_test.py::test_steps_go_on",
    "models/packed_test.py::test_one_document",
    "models/published_configs_test.py::test_an_export_has_the_same_tensors",
    "models/published_configs_test.py::test_logits_are",
    "models/selection_test.py::test_the_head_gives",
    "models/transformer_test.py::test_adapter_dropout_follows",
    "models/transformer_test.py::test_every_adapter_of_every_layer",
    "models/transformer_test.py::test_how_layers_are_run",
    "models/transformer_test.py::test_layers_compiled_one_by_one",
    "moe_test.py::test_a_coefficient",
    "moe_test.py::test_a_run_logs",
    "moe_test.py::test_loss_and_next_weights",
    "moe_test.py::test_optimizers_treat",
    "moments_test.py::test_a_run_with_eight",
    "moments_test.py::test_eight_bits_are_split",
    "moments_test.py::test_every_optimizer",
    "multihost_test.py",
    "objective_key_test.py::test_keywords_of_a_preference_loss",
    "offload_test.py::test_an_update_by_layers",
    "optim_test.py::test_stacked_layers",
    "optim_test.py::test_state_is_float32_even",
    "out_of_memory_test.py::test_a_run_that",
    "own_parts_test.py::test_a_callback",
    "own_parts_test.py::test_a_run_exports",
    "own_parts_test.py::test_a_stopped_run",
    "own_parts_test.py::test_an_own_metric",
    "own_parts_test.py::test_frozen_weights",
    "own_parts_test.py::test_own_trackers",
    "packed_pairs_test.py",
    "preemption_test.py",
    "preference_test.py::test_micro_batches_add_up",
    "preference_test.py::test_padding_pairs_change",
    "profile_test.py::test_a_run_that_ends_within",
    "profile_test.py::test_the_trace_has",
    "quantization_test.py::test_a_quantized_model",
    "quantization_test.py::test_a_resumed_run",
    "quantization_test.py::test_four_bits",
    "quantization_test.py::test_the_gradient_of",
    "quantization_test.py::test_the_merged_model",
    "report_test.py::test_at_500",
    "run_lock_test.py::test_of_many_that_find",
    "security_test.py::test_a_local_run_asks",
    "shared_prompt_test.py::test_losses_and_metrics_are_those",
    "shared_prompt_test.py::test_the_model_gives_each_side",
    "site_test.py",
    "special_tokens_test.py::test_another_tokenizer",
    "special_tokens_test.py::test_our_generation",
    "special_tokens_test.py::test_the_export_keeps",
    "start_test.py::test_config_json_keeps",
    "start_test.py::test_the_memory_estimate",
    "storage_test.py::test_a_busy_server",
    "streaming_test.py::test_a_run_that_dies",
    "summary_test.py::test_runs_end",
    "trainer_test.py::test_a_run_on_eight",
    "trainer_test.py::test_an_adapter_run",
    "trainer_test.py::test_evaluation_picks",
    "trainer_test.py::test_every_training_type_runs_to_the_end_and_exports[dpo",
    "trainer_test.py::test_every_training_type_runs_to_the_end_and_exports[lora",
    "trainer_test.py::test_every_training_type_runs_to_the_end_and_exports[sft",
    "trainer_test.py::test_offloaded_state",
    "trainer_test.py::test_precomputed_reference",
    "trainer_test.py::test_resume_after",
    "trainer_test.py::test_the_export_loads",
    "trainer_test.py::test_the_export_loads_in_transformers[dpo",
    "trainer_test.py::test_the_export_loads_in_transformers[sft",
    "vocabulary_test.py::test_new_rows_start",
    "what_packs_test.py::test_a_run_packs",
    "z_loss_test.py::test_a_run_adds",
    "z_loss_test.py::test_the_heads_gradients",
)

# Files and tests, beside the fast ones, that use what another jax may break: kernels
# with their interpreters, and a whole run as a user starts it.
AGAIN = ("kernels/", "main_test.py", "aot_test.py")
# And of both, what takes long and uses nothing that others there do not: variants in
# plain jax, each kind of layer trained, each family's decoding.
NOT_AGAIN = (
    "kernels/attention/attention_test.py::test_nan_in_padding_reaches_no_output_and_no"
    "_gradient[xla_chunked",
    *(
        "kernels/attention/attention_test.py::test_output_and_gradients_equal_float64"
        f"[{case}"
        for case in (
            # Of kernels, what other cases have together with more.
            *(
                f"{kernel}-{mask}"
                for kernel in ("pallas_tpu", "pallas_triton")
                for mask in ("all_to_all", "causal", "packed_window", "window")
            ),
            "reference",
            "xla-",
            "xla_chunked",
        )
    ),
    "kernels/attention/attention_test.py::test_xla_agrees",
    "kernels/attention/partition_test.py::test_values_and_gradients_are_those_of_one"
    "_device[four",
    "kernels/attention/schedule_test.py::test_random_ids",
    *(
        "kernels/linear_cross_entropy/api_test.py::test_outputs_and_gradients_equal"
        f"_float64[{slices}"
        for slices in ("1000-1", "9-1")
    ),
    "models/layer_kinds_test.py",
    "models/transformer_test.py::test_greedy_decoding_equals_the_argmax",
)


def is_again(nodeid: str, markers: set[str]) -> bool:
    """Whether CI's second Python runs a test, of the files that `.ci/run` names."""
    name = nodeid.removeprefix("tests/")
    chosen = is_fast(nodeid, markers) or name.startswith(AGAIN)
    return chosen and not name.startswith(NOT_AGAIN)


def is_fast(nodeid: str, markers: set[str]) -> bool:
    """Whether a test belongs to the fast ones.

    Args:
        nodeid: its name as pytest has it, from the repository's root.
    """
    name = nodeid.removeprefix("tests/")
    return not markers & {*MARKERS} and not name.startswith(LEFT_OUT)
