"""Settings every test shares: eight fake CPU devices, one compilation cache."""

import gc
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import xla_flags

# Before jax is imported anywhere: eight CPU devices stand in for a mesh. `gpu` tests
# run on a GPU machine with JAXTRAIN_TEST_PLATFORM=cuda.
_PLATFORM = os.environ.get("JAXTRAIN_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = _PLATFORM
if _PLATFORM == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.flags(8)}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "JAXTRAIN_CACHE",
    str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "data"),
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# In the environment, so that processes which a test starts have them too. To read a
# program takes as long as to compile one of a tenth of a second.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
import pytest  # noqa: E402
from fast import is_again, is_fast  # noqa: E402
from hypothesis import settings  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

jax.config.update("jax_threefry_partitionable", True)

# Compilation makes the first example of a property slow; that is no flakiness.
# Where all ran before on another jax, a few examples tell.
EXAMPLES = int(os.environ.get("JAXTRAIN_TEST_EXAMPLES", "20"))
settings.register_profile(
    "jaxtrain", deadline=None, max_examples=EXAMPLES, derandomize=True
)
settings.load_profile("jaxtrain")

# Python would look through all that torch, transformers and jax have made, again and
# again: a twentieth of the time.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


# The longest tests, most of them variants of what another shows, together a third of
# all the time: CI has 35 minutes. They get the marker `on_request`, which may stand at
# a test itself too. JAXTRAIN_TEST_ALL=1 runs them.
THOROUGH = (
    "assets_test.py::test_a_rebuild_gives_the_same_bytes",
    # The batches of the default loss, scored without a reference.
    "aot_test.py::test_every_kind_of_batch_compiles_ahead_of_time[simpo",
    "bucket_kills_test.py::test_a_run_killed_at_requests_ends_as_without_kills[gs-2",
    "bucket_kills_test.py::test_a_run_killed_at_requests_ends_as_without_kills[s3",
    "bucket_models_test.py::test_each_of_two_processes_reads_half",
    # Of adapters on s3; bucket_checkpoint_test has every kind of leaf.
    "bucket_runs_test.py::test_a_run_in_a_bucket_is_one_on_a_disk[dpo]",
    "bucket_runs_test.py::test_a_run_in_a_bucket_is_one_on_a_disk[lora]",
    "bucket_kills_test.py::test_a_run_killed_at_requests_ends_as_without_kills[gs-1",
    # Four bits are tested, and on a mesh.
    "expert_adapters_test.py::test_experts_in_few_bits_act_as_what_they_stand_for[int8",
    # Layers are recomputed below, and a reference is frozen.
    "fp8_step_test.py::test_gradients_of_a_step_are_near_those_in_bfloat16[none",
    "fp8_step_test.py::test_runs_train_with_a_frozen_model_in_eight_bits[lora",
    # Both at once are tested, and each alone in one of these.
    *(
        "kernels/linear_cross_entropy/api_test.py::test_outputs_and_gradients_equal"
        f"_float64[{case}-{option}]"
        for case in ("1000-1-0", "1000-1-1", "9-1-0", "9-1-1", "9-2-1")
        for option in ("softcap", "scale")
    ),
    "launch_test.py::test_the_notebook_runs_in_a_shortened_form",
    # Two and four devices share a row.
    "kernels/attention/partition_test.py::test_values_and_gradients_are_those_of_one"
    "_device[three_share",
    # Each family's logits and export are compared alike, and each of what differs in a
    # step (tied heads, softcaps, experts, wrappers) has a family that takes one here.
    *(
        f"models/published_configs_test.py::test_a_step_at_learning_rate_zero_exports"
        f"_what_was_loaded[{family}]"
        for family in (
            "gemma3_text",
            "gemma4_text",
            "glm4",
            "llama",
            "mistral",
            "mixtral",
            "phi3",
            "qwen2",
            "qwen3",
            "qwen3_moe",
        )
    ),
    # Gemma 3's text alone is exported here, and Gemma 4 within its wrapper.
    "models/composite_test.py::test_a_step_at_learning_rate_zero_exports_what_was_loaded"
    "[gemma4-True",
    "models/composite_test.py::test_a_lora_run_exports_what_peft_and_transformers_find"
    "[gemma3-True",
    # Its log-probs in packed rows, gradients and adapters are compared with
    # transformers and PEFT, and other families are trained beside TRL.
    "models/layer_kinds_test.py::test_packed_documents_learn_as_they_do_alone[gemma4",
    "trl_training_test.py::test_other_families_log_and_learn_what_trl_does[gemma4_text",
    # The kernels are split over devices in delta_rule_test, and convolutions here.
    "models/delta_net_test.py::test_a_mesh_of_eight_changes_no_number",
    "models/composite_test.py::test_a_step_at_learning_rate_zero_exports_what_was_loaded"
    "[mistral3",
    "trl_training_test.py::test_twenty_steps_log_and_learn_what_trl_does[llama-dpo",
    "trl_training_test.py::test_a_synced_reference_moves_as_in_trl[qwen2",
    "trl_training_test.py::test_an_adapter_trains_on_as_in_trl[lora-sft-llama",
    "commands_test.py::test_eval_repeats_the_numbers_of_the_log_and_leaves_the_run_alone"
    "[dpo_lora",
    "commands_test.py::test_eval_repeats_the_numbers_of_the_log_and_leaves_the_run_alone"
    "[dpo_sums",
    # Adapters are evaluated on their base, and sft's and dpo's weights by step.
    "commands_test.py::test_eval_repeats_the_numbers_of_the_log_and_leaves_the_run_alone"
    "[lora]",
    "base_weights_test.py::test_a_run_on_replaced_weights_is_refused[lora",
    "curriculum_test.py::test_the_step_compiles_at_most_once_a_bucket[dpo",
    "context_test.py::test_losses_gradients_and_weights_are_those_of_one_device[dpo",
    "context_test.py::test_losses_gradients_and_weights_are_those_of_one_device[from",
    "context_test.py::test_losses_gradients_and_weights_are_those_of_one_device[lora",
    "curriculum_test.py::test_a_resumed_run_takes_its_difficulties",
    "curriculum_test.py::test_the_models_own_loss_puts_easy_rows_first",
    "curriculum_test.py::test_the_step_compiles_at_most_once_a_bucket[from_scratch]",
    "data/stream_batches_test.py::test_worker_processes_change_nothing",
    "diagnostics_test.py::test_a_run_that_only_skips_ends",
    "diagnostics_test.py::test_a_spike_is_skipped_or_stops_the_run",
    # What the notebook, main_test or trainer_test show too.
    "docs_test.py::test_every_command_of_the_page_runs[docs/tutorials/dpo.md]",
    # documented_interface_test has DPOTrainer, commands_test generates and chats, and a
    # sweep is runs and a report, as on other pages.
    "docs_test.py::test_every_command_of_the_page_runs[docs/tutorials/chat.md]",
    "docs_test.py::test_every_command_of_the_page_runs[docs/tutorials/dpo-trainer.md]",
    "docs_test.py::test_every_command_of_the_page_runs[docs/tutorials/sweep.md]",
    "docs_test.py::test_every_command_of_the_page_runs[docs/tutorials/lora.md]",
    "docs_test.py::test_every_command_of_the_page_runs[docs/tutorials/first-run.md]",
    "docs_test.py::test_every_command_of_the_page_runs[docs/tutorials/resume.md]",
    "documented_interface_test.py::test_a_yaml_example_trains[dpo]",
    "documented_interface_test.py::test_a_yaml_example_trains[high_performance]",
    "documented_interface_test.py::test_a_yaml_example_trains[from_scratch]",
    "documented_interface_test.py::test_a_yaml_example_trains[sft]",
    # The examples on memory and curricula train too.
    "documented_interface_test.py::test_a_yaml_example_trains[memory_efficient]",
    # The page on the custom step and trainer_test have an auxiliary loss too.
    "documented_interface_test.py::test_the_custom_trainer_in_its_jax_form",
    "documented_interface_test.py::test_a_yaml_example_trains[lora]",
    "main_test.py::test_every_config_runs_to_the_end[from_scratch]",
    "main_test.py::test_every_config_runs_to_the_end[lora]",
    "main_test.py::test_every_config_runs_to_the_end[sft]",
    "main_test.py::test_a_yaml_file_in_the_documented_form_runs",
    "moe_test.py::test_dpo_with_adapters_over_a_mesh_logs_the_router_loss",
    "moe_test.py::test_loss_and_next_weights_are_the_same_on_a_mesh_of_eight[lora",
    "multihost_test.py",
    "neftune_test.py::test_it_acts_on_training_alone",
    # Of orpo; trl_losses_test has simpo's loss.
    "objective_key_test.py::test_objectives_without_a_reference_train[simpo",
    "objective_key_test.py::test_an_own_loss_is_named_with_its_arguments",
    "objective_key_test.py::test_an_own_loss_of_pairs_gets_the_reference",
    "own_parts_test.py::test_multipliers_scale_what_adamw_does",
    "own_parts_test.py::test_adapters_are_frozen_by_their_names",
    "packed_pairs_test.py::test_a_packed_run_trains_on_every_pair",
    "preemption_test.py::test_the_log_has_the_goodput_and_it_survives_a_restart",
    # The model of quantized kernels is compared with that of dequantized ones.
    "quantization_test.py::test_four_bits_cost_a_few_percent_of_perplexity",
    "quantization_test.py::test_a_resumed_run_ends_at_the_same_bits",
    "quantization_test.py::test_the_dpo_reference_is_the_quantized_base_on_any_mesh",
    "samples_test.py::test_a_model_split_over_devices_scores_and_generates_the_same",
    # what_packs_test has pairs, packed with shared prompts, against padded ones.
    "shared_prompt_test.py::test_a_packed_run_that_shares_prompts_trains",
    "streaming_test.py::test_an_iterable_dataset_is_a_stream",
    # Those of dpo, and of runs that are stopped in own_parts_test and streaming_test.
    "trainer_test.py::test_resume_after_sigkill_is_bit_exact[from_scratch]",
    "trainer_test.py::test_resume_after_sigkill_is_bit_exact[lora]",
    "trainer_test.py::test_resume_after_sigkill_is_bit_exact[sft]",
    "trainer_test.py::test_a_run_on_eight_devices_equals_one_on_one[lora]",
    "trainer_test.py::test_a_synced_reference_follows_the_policy",
    # Both pages on the DPO trainer do it.
    "trainer_test.py::test_dpo_trainer_takes_a_loaded_model_and_rows",
    "trl_training_test.py::test_a_mixture_of_experts_logs_and_learns_what_trl_does"
    "[mixtral-lora",
    "trl_training_test.py::test_a_pissa_run_exports",
    "trl_training_test.py::test_dora_under_dpo_differs_from_trl_by_rounding_alone",
    "trl_training_test.py::test_twenty_steps_log_and_learn_what_trl_does[llama-lora",
    "trl_training_test.py::test_twenty_steps_log_and_learn_what_trl_does[qwen2-dpo]",
    "trl_training_test.py::test_twenty_steps_log_and_learn_what_trl_does[qwen2-sft]",
    "trl_training_test.py::test_twenty_steps_log_and_learn_what_trl_does[qwen2-lora-sft",
    "trl_training_test.py::test_an_adapter_trains_on_as_in_trl[lora-dpo",
    # Tied models grow in runs here, and untied ones without.
    "vocabulary_test.py::test_new_rows_start_as_in_transformers_train_and_are_exported"
    "[untied",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[cpo",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[experts",
    # batch_packing_test has these losses packed, and trainer_test has sums that are
    # computed before and packed as here.
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[ld_alpha",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[orpo",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[precomputed",
    # It falls back as windows do.
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[longrope",
    # Adapters act on each token, in whatever row.
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[dora",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[lengths]",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[own data",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[simpo",
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[stream, window",
    # Streams of pairs pack as those of single rows do.
    "what_packs_test.py::test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows"
    "[stream]",
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="needs JAXTRAIN_TEST_PLATFORM=cuda and a GPU")
    skip_long = pytest.mark.skip(reason="takes long: JAXTRAIN_TEST_ALL=1 runs it")
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name.startswith(THOROUGH) or item.get_closest_marker("aot"):
            item.add_marker("on_request")
        markers = {mark.name for mark in item.iter_markers()}
        if "gpu" in markers and _PLATFORM == "cpu":
            item.add_marker(skip_gpu)
        if "on_request" in markers and not os.environ.get("JAXTRAIN_TEST_ALL"):
            item.add_marker(skip_long)
        if is_fast(item.nodeid, markers):
            item.add_marker("fast")
        if is_again(item.nodeid, markers):
            item.add_marker("again")
    # Files of the longest tests first and of fast ones last, so that no worker is left
    # alone with a long one at the end.
    long_files = {item.path for item in items if "slow" in item.keywords}
    other_files = {item.path for item in items if "fast" not in item.keywords}
    items.sort(
        key=lambda item: (item.path not in long_files, item.path not in other_files)
    )


@pytest.fixture(scope="session")
def shared_directory() -> pathlib.Path:
    """The folder of large test data beside the repository, or skip."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: it holds the test's larger data")
    return SHARED
