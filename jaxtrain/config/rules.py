"""What keys mean together: precedence, values worked out from others, contradictions.

`Resolver` goes through a configuration once and collects every problem, so that one
run of the command shows them all.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtrain import schema
from jaxtrain.config.mesh_shape import nearest_mesh_shape
from jaxtrain.config.sections import (
    DEFAULT_MAX_LENGTH,
    GENERAL_KEYS,
    LORA_LEARNING_RATES,
    PLAIN_SECTIONS,
    SCHEDULE_KWARGS,
    SCHEMA,
    TEXT_METRIC_NAMES,
    TEXT_METRIC_SCORES,
    TRAINING_SECTIONS,
    TYPE_DEFAULTS,
    CurriculumSection,
    DpoSection,
    GenerationSection,
    LoraSection,
    TrainingType,
)
from jaxtrain.objectives.options import (
    ObjectiveRow,
    PreferenceOptions,
    make_options,
    objective_row,
    unknown_objective,
)
from jaxtrain.tree import dotted, get, nest

# LoRA keys that count beside the settings of an adapter that is read.
_BESIDE_AN_ADAPTER = (
    "enabled", "init_from", "lora_dropout", "quantization", "quantization_block_size",
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
)  # fmt: skip


class ConfigError(ValueError):
    """All problems of a configuration, one `key = value: problem; fix` a line."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (
            problems.splitlines() if isinstance(problems, str) else list(problems)
        )
        super().__init__("\n".join(self.problems))


class Resolver:
    """One pass over one configuration; collects problems and notes on the way.

    `general` maps each general training key (dotted, as in "deepspeed.zero_stage") to
    its value; `origin` to the full key that gave it. `unset` are those nobody set.
    """

    def __init__(self, given: Mapping[str, Any], device_count: int | None) -> None:
        self.values, self.refused = schema.merge(SCHEMA, given)
        self.problems = list(self.refused.values())
        self.notes: list[str] = []
        self.device_count = device_count
        self.training = self.values["training"]
        self.type: TrainingType = self.training["training_type"]
        self.model, self.data = self.values["model"], self.values["data"]
        self.mesh = self.values["mesh"]
        self.lora, self.dpo = (
            {key: self.training[name][key] for key in section.__dataclass_fields__}
            for name, section in (("lora", LoraSection), ("dpo", DpoSection))
        )
        self.general: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.unset: set[str] = set()

    def run(self) -> dict[str, Any]:
        """The fields of a RunConfig.

        Raises:
            ConfigError: every problem found.
        """
        self.resolve_lora()
        self.take_precedence()
        self.note_ineffective()
        self.resolve_warmup()
        self.check_schedule()
        self.check_optimizer()
        self.resolve_precision()
        self.resolve_loop()
        self.resolve_generation()
        self.resolve_devices()
        self.resolve_mesh()
        self.resolve_lengths()
        self.check_model()
        self.take_objective_kwargs()
        self.check_data()
        self.check_curriculum()
        self.check_objective()
        row = self.objective
        if self.type == "dpo" and (row is None or row.options is PreferenceOptions):
            self.check_dpo()
        if self.problems:
            raise ConfigError(self.problems)
        return self.build_sections()

    def build_sections(self) -> dict[str, Any]:
        general = nest({tuple(key.split(".")): v for key, v in self.general.items()})
        build = schema.build
        return {
            "training_type": self.type,
            **{n: build(s, self.values[n]) for n, s in PLAIN_SECTIONS.items()},
            **{n: build(s, general) for n, s in TRAINING_SECTIONS.items()},
            "curriculum": build(CurriculumSection, general["curriculum"]),
            "generation": build(GenerationSection, general["generation"]),
            "lora": build(LoraSection, self.lora) if self.lora["enabled"] else None,
            "dpo": build(DpoSection, self.dpo) if self.type == "dpo" else None,
            "notes": tuple(self.notes),
        }

    def problem(
        self, key: str, value: Any, problem: str, fix: str, *reads: str
    ) -> None:
        """Refuse `key`: a full key, or a general training key.

        Nothing is said where its value, or that of one of the keys that the rule
        `reads` besides, was refused before: the rule has seen a default in its place.
        """
        full, *others = (self.origin.get(each, each) for each in (key, *reads))
        if not self.refused.keys() & {full, *others}:
            self.problems.append(f"{full} = {value!r}: {problem}; {fix}")

    # --- precedence -------------------------------------------------------------------

    def take_precedence(self) -> None:
        """Fill `general`: the active block, `training`, then the type's default."""
        shared, block, usual = (
            {key: get(tree, key) for key in GENERAL_KEYS}
            for tree in (
                self.training,
                self.training[self.type],
                schema.defaults(SCHEMA["training"]),
            )
        )
        type_defaults = dict(TYPE_DEFAULTS[self.type])
        if self.lora["enabled"]:
            type_defaults["learning_rate"] = LORA_LEARNING_RATES[self.type]
        self.take_warmup_from_one_place(shared, block)
        for key in GENERAL_KEYS:
            self.general[key], self.origin[key] = shared[key], f"training.{key}"
            if block[key] is not None:
                self.general[key] = block[key]
                self.origin[key] = f"training.{self.type}.{key}"
                if shared[key] not in (block[key], usual[key]):
                    self.note_gives_way(key, shared[key], self.origin[key], block[key])
            elif shared[key] is None:
                self.general[key] = type_defaults.get(key)
                self.unset.add(key)

    def take_warmup_from_one_place(
        self, shared: dict[str, Any], block: dict[str, Any]
    ) -> None:
        """A block that sets one of the two warm-up keys speaks for both.

        Else a general warmup_steps would overrule a block's warmup_ratio.
        """
        pair = ("warmup_steps", "warmup_ratio")
        speaks = shared
        for one, other in (pair, pair[::-1]):
            if block[one] is not None:
                speaks = block
                if shared[other] and block[other] is None:
                    origin = f"training.{self.type}.{one}"
                    self.note_gives_way(other, shared[other], origin, block[one])
                    shared[other] = None
        if any(speaks[key] is not None for key in pair):
            for key in pair:
                speaks[key] = speaks[key] or 0

    def note_gives_way(self, key: str, value: Any, winner: str, winning: Any) -> None:
        self.notes.append(
            f"training.{key} = {value!r} gives way to {winner} = {winning!r}"
        )

    def note_ineffective(self) -> None:
        """Name the keys that were set and that this run does not read."""
        unread: dict[str, str] = {}
        for name in TYPE_DEFAULTS:
            if name != self.type:
                for key in dotted(SCHEMA["training"][name]):
                    unread[f"training.{name}.{key}"] = f"training_type is {self.type}"
        for key in self.lora:
            unread.pop(f"training.lora.{key}", None)
            if not self.lora["enabled"] and key != "enabled":
                unread[f"training.lora.{key}"] = "training.lora.enabled is false"
            elif self.lora["init_from"] and key not in _BESIDE_AN_ADAPTER:
                unread[f"training.lora.{key}"] = (
                    "training.lora.init_from brings its own"
                )
        if self.type != "from_scratch":
            for key in SCHEMA["model"]["architecture"]:
                unread[f"model.architecture.{key}"] = "sizes come with the checkpoint"
        if not self.general["curriculum.enabled"]:
            for key in SCHEMA["training"]["curriculum"]:
                unread[f"training.curriculum.{key}"] = "curriculum.enabled is false"
        if not self.generates():
            for key in SCHEMA["training"]["generation"]:
                unread[f"training.generation.{key}"] = "generation.enabled is false"
        if not self.data["streaming"]:
            for key in ("shuffle_buffer_size", "stream_window_rows"):
                unread[f"data.{key}"] = "data.streaming is false"
        usual = schema.defaults(SCHEMA)
        for key, reason in unread.items():
            value = get(self.values, key)
            if value != get(usual, key):
                self.notes.append(f"{key} = {value!r} has no effect: {reason}")

    # --- the training section ---------------------------------------------------------

    def resolve_lora(self) -> None:
        enabled = self.lora["enabled"]
        if self.type == "lora" and enabled is False:
            self.problem(
                "training.lora.enabled", False,
                "training_type is 'lora'",
                "set it true, or train all parameters with training_type 'sft'",
            )  # fmt: skip
        if self.type == "from_scratch" and enabled:
            self.problem(
                "training.lora.enabled", True,
                "adapters on random weights learn little: from_scratch trains all",
                "set it false, or choose training_type sft, lora or dpo",
            )  # fmt: skip
            enabled = False
        self.lora["enabled"] = self.type == "lora" or bool(enabled)
        if self.lora["enabled"] and not self.lora["target_modules"]:
            self.problem(
                "training.lora.target_modules", self.lora["target_modules"],
                "no module would get an adapter",
                'set "all-linear" or names such as ["q_proj", "v_proj"]',
            )  # fmt: skip
        self.resolve_quantization()
        if (
            self.lora["enabled"]
            and self.lora["init_lora_weights"] in ("pissa", "olora")
            and self.type == "dpo"
            and self.dpo["sync_ref_model"]
        ):
            self.problem(
                "training.lora.init_lora_weights", self.lora["init_lora_weights"],
                "the reference holds the first adapters, which sync_ref_model moves",
                "set it to default or gaussian, or sync_ref_model to false",
            )  # fmt: skip

    def resolve_quantization(self) -> None:
        """One of the base's kinds, by our key or by transformers' names."""
        lora = self.lora
        kinds = {"load_in_4bit": lora["bnb_4bit_quant_type"], "load_in_8bit": "int8"}
        named = [(f"training.lora.{k}", kind) for k, kind in kinds.items() if lora[k]]
        if lora["quantization"]:
            named.insert(0, ("training.lora.quantization", lora["quantization"]))
        if not named:
            return
        key, kind = named[0]
        if others := [name for name, other in named if other != kind]:
            self.problem(
                key, kind, f"{others[0]} asks for another", "set one of them only"
            )
        if not lora["enabled"]:
            self.problem(
                key, kind, "a quantized base does not train, only adapters beside it",
                "set training.lora.enabled = True (or training_type lora), or unset it",
            )  # fmt: skip
        if lora["quantization_block_size"] % 2:
            self.problem(
                "training.lora.quantization_block_size",
                lora["quantization_block_size"], "two codes make a byte",
                "set an even number that divides the model's widths, such as 64",
            )  # fmt: skip
        init = lora["init_lora_weights"]
        if init in ("pissa", "olora") and not lora["init_from"]:
            self.problem(
                "training.lora.init_lora_weights", init,
                "it takes the first adapters out of the base, and the base's codes"
                " cannot hold the difference",
                f"set it to default or gaussian, or unset {key}",
            )  # fmt: skip
        lora["quantization"] = kind

    def resolve_warmup(self) -> None:
        general = self.general
        steps, ratio = general["warmup_steps"] or 0, general["warmup_ratio"] or 0.0
        if steps and ratio:
            self.notes.append(
                f"{self.origin['warmup_ratio']} = {ratio} has no effect:"
                f" warmup_steps = {steps} takes precedence, as in transformers"
            )
            ratio = 0.0
        if general["lr_scheduler_type"] == "constant" and (steps or ratio):
            unit = "warmup_steps" if steps else "warmup_ratio"
            if "warmup_ratio" in self.unset:
                ratio = 0.0  # only the type's default asked for it
            else:
                self.problem(
                    unit, general[unit],
                    "lr_scheduler_type 'constant' has no warm-up",
                    "set lr_scheduler_type = 'constant_with_warmup', or remove it",
                )  # fmt: skip
        general["warmup_steps"], general["warmup_ratio"] = steps, ratio

    def check_schedule(self) -> None:
        general = self.general
        name = general["lr_scheduler_type"]
        prefix = "lr_scheduler_kwargs."
        options = {
            key.removeprefix(prefix): value
            for key, value in general.items()
            if key.startswith(prefix) and value is not None
        }
        allowed = SCHEDULE_KWARGS[name]
        for option in options.keys() - set(allowed):
            takes = ", ".join(allowed) or "none"
            self.problem(
                prefix + option, options[option],
                f"lr_scheduler_type {name!r} does not read it",
                f"remove it (it takes {takes})",
            )  # fmt: skip
        cycles = options.get("num_cycles", 1)
        if name == "cosine_with_restarts" and cycles != int(cycles):
            self.problem(
                prefix + "num_cycles", cycles,
                "restarts are counted in whole cycles", "set an integer >= 1",
            )  # fmt: skip
        if name == "cosine_with_min_lr" and ("min_lr" in options) == (
            "min_lr_rate" in options
        ):
            self.problem(
                "lr_scheduler_type", name,
                "needs one of lr_scheduler_kwargs.min_lr and min_lr_rate",
                "set exactly one",
            )  # fmt: skip
        for option in ("min_lr", "lr_end"):
            if option in options and options[option] >= general["learning_rate"]:
                self.problem(
                    prefix + option, options[option],
                    f"not below learning_rate = {general['learning_rate']}",
                    "set a smaller one: the schedule decays to it",
                )  # fmt: skip

    def check_optimizer(self) -> None:
        name, momentum = self.general["optimizer"], self.general["momentum"]
        if momentum is not None and name not in ("sgd", "muon"):
            self.problem(
                "momentum", momentum, f"optimizer {name!r} does not read it",
                "remove it (adam_beta1 is adamw's and lion's), or use sgd or muon",
            )  # fmt: skip

    def resolve_precision(self) -> None:
        if self.general["fp16"] and self.general["bf16"]:
            self.problem(
                "fp16", True, "bf16 is true too, and a run computes in one precision",
                f"set {self.origin['bf16']} = false, or fp16 = false",
            )  # fmt: skip
        if self.general["bf16"] is None:
            self.general["bf16"] = not self.general["fp16"]

    def resolve_loop(self) -> None:
        general = self.general
        if general["max_steps"] != -1 and general["max_steps"] < 1:
            self.problem(
                "max_steps", general["max_steps"], "neither -1 nor positive",
                "set -1 to count epochs, or the number of optimizer steps",
            )  # fmt: skip
        if general["greater_is_better"] is None:
            smaller = ("loss", "perplexity", "kl")
            metric = general["metric_for_best_model"]
            general["greater_is_better"] = not metric.endswith(smaller)
        if "none" in general["report_to"]:
            if len(general["report_to"]) > 1:
                self.problem(
                    "report_to", general["report_to"],
                    "'none' stands beside other trackers", "remove one or the other",
                )  # fmt: skip
            general["report_to"] = ()
        best = general["load_best_model_at_end"]
        for key in ("early_stopping_patience", "load_best_model_at_end"):
            if general[key] and general["eval_steps"] == 0:
                self.problem(
                    key, general[key], "eval_steps = 0 never evaluates",
                    "set eval_steps, or unset it to evaluate after each epoch",
                )  # fmt: skip
        evals, saves = general["eval_steps"], general["save_steps"]
        if best and saves == 0:
            self.problem(
                "save_steps", 0, "load_best_model_at_end needs checkpoints",
                "set save_steps to a multiple of eval_steps",
            )  # fmt: skip
        elif best and evals != saves and not (evals and saves and saves % evals == 0):
            self.problem(
                "save_steps", saves,
                f"load_best_model_at_end needs each checkpoint evaluated, and"
                f" eval_steps = {evals}",
                "set save_steps to a multiple of eval_steps, or leave both unset",
            )  # fmt: skip

    def generates(self) -> bool:
        """`generation.enabled`; unset, whether any metric is named."""
        enabled = self.general["generation.enabled"]
        return bool(self.general["generation.metrics"]) if enabled is None else enabled

    def resolve_generation(self) -> None:
        general, enabled = self.general, self.generates()
        if not enabled:
            usual = schema.defaults(SCHEMA["training"])
            general |= {k: get(usual, k) for k in general if "generation." in k}
        general["generation.enabled"] = enabled
        if enabled and general["eval_steps"] == 0 and not general["eval_on_start"]:
            self.problem(
                "generation.enabled", True, "eval_steps = 0 never evaluates",
                "set eval_steps, or unset it to evaluate after each epoch",
            )  # fmt: skip
        metrics = general["generation.metrics"]
        for name in metrics:
            if name not in TEXT_METRIC_NAMES and ":" not in name:
                self.problem(
                    "generation.metrics", metrics, f"{name!r} is no metric",
                    f"choose from {', '.join(TEXT_METRIC_NAMES)}, or write a function"
                    " of your own as module:function",
                )  # fmt: skip
        if "bertscore" in metrics and not general["generation.bertscore_model"]:
            self.problem(
                "generation.metrics", metrics, "bertscore needs an encoder",
                "set generation.bertscore_model to a local Hugging Face directory",
            )  # fmt: skip
        best = general["metric_for_best_model"]
        # A function of the user's own may give a score of any name.
        has_own = any(":" in metric for metric in metrics)
        for name, scores in TEXT_METRIC_SCORES.items():
            is_one = best.removeprefix("eval_") in scores
            if is_one and name not in metrics and not has_own:
                self.problem(
                    "metric_for_best_model", best,
                    f"generation.metrics = {metrics} does not compute it",
                    f"add {name!r} to generation.metrics",
                )  # fmt: skip

    # --- devices ----------------------------------------------------------------------

    def resolve_devices(self) -> None:
        general = self.general
        pins = ("dataloader_pin_memory", "pin_memory")
        chosen = {general[key] for key in pins} - {None}
        if len(chosen) > 1:
            self.problem(
                "pin_memory", general["pin_memory"],
                f"dataloader_pin_memory = {general['dataloader_pin_memory']}, and both"
                " name the same thing",
                "set one of them, or both alike",
            )  # fmt: skip
        general |= dict.fromkeys(pins, chosen != {False})
        for state in ("offload_optimizer", "offload_param"):
            key = f"deepspeed.{state}"
            if general["cpu_offload"] and general[key] is False:
                self.problem(
                    key, False, "cpu_offload = true offloads it",
                    "remove it, or set cpu_offload = false and choose by deepspeed",
                )  # fmt: skip
            general[key] = bool(general[key] or general["cpu_offload"])
        wanted = general["num_gpus"]
        if wanted and self.device_count and wanted > self.device_count:
            self.problem(
                "num_gpus", wanted, f"only {self.device_count} devices are present",
                f"set {self.device_count} or fewer, or unset it to use all",
            )  # fmt: skip

    def resolve_mesh(self) -> None:
        """Sizes of the mesh, and which state is split: zero_stage 3 <=> mesh.fsdp."""
        mesh, stage = self.mesh, self.general["deepspeed.zero_stage"]
        for axis, size in mesh.items():
            if size is not None and size != -1 and size < 1:
                self.problem(
                    f"mesh.{axis}", size, "not a size",
                    "set a positive integer, or -1 for the rest of the devices",
                )  # fmt: skip
                return
        axes = ("data", "fsdp", "context", "tensor")
        self.check_reserved_axes()
        rest = ("fsdp", "data") if stage == 3 else ("data", "fsdp")
        for axis in rest:
            if mesh[axis] is None:
                taken = any(mesh[other] == -1 for other in axes)
                # The first unset axis takes the rest; fsdp only where asked for.
                asked = axis == "data" or stage == 3
                mesh[axis] = -1 if asked and not taken else 1
        wildcards = [f"mesh.{axis}" for axis in axes if mesh[axis] == -1]
        if len(wildcards) > 1:
            self.problem(
                wildcards[0], -1, f"{', '.join(wildcards[1:])} is -1 too",
                "leave one axis at -1: it takes the devices that remain",
            )  # fmt: skip
            return
        self.fill_mesh(axes)
        self.check_context()
        self.check_slices()
        self.check_zero_stage()

    def fill_mesh(self, axes: tuple[str, ...]) -> None:
        """Replace the -1, where the number of devices is known."""
        mesh, wanted = self.mesh, self.general["num_gpus"]
        count = wanted or self.device_count
        if count is None:
            return
        source = self.origin["num_gpus"] if wanted else "the number of devices"
        fixed = math.prod(mesh[axis] for axis in axes if mesh[axis] != -1)
        shape = " x ".join(f"{axis} {mesh[axis]}" for axis in axes)
        free = next((axis for axis in axes if mesh[axis] == -1), None)
        if free and count % fixed == 0:
            mesh[free] = count // fixed
            return
        nearest = nearest_mesh_shape({axis: mesh[axis] for axis in axes}, count)
        near = " x ".join(f"{axis} {size}" for axis, size in nearest.items())
        if free:
            self.problem(
                "mesh", shape, f"{source} is {count}, not divisible by {fixed}",
                f"set sizes that divide it; the nearest are {near or 'all 1'}",
            )  # fmt: skip
        elif fixed != count:
            self.problem(
                "mesh", shape, f"uses {fixed} devices, but {source} is {count}",
                "set one axis to -1, or training.num_gpus to the mesh's size; the"
                f" nearest for {count} is {near or 'all 1'}",
            )  # fmt: skip

    def check_reserved_axes(self) -> None:
        """Axes that the mesh names and nothing is split over yet."""
        reasons = {
            "expert": (
                "every device applies its part of all experts",
                "set 1: mesh.fsdp splits a mixture's weights, mesh.tensor its work",
            ),
            "stage": (
                "layers are not split into stages: one scan runs them all",
                "set 1, and split layers' weights by mesh.fsdp or mesh.tensor",
            ),
        }
        for axis, (problem, fix) in reasons.items():
            if self.mesh[axis] != 1:
                self.problem(f"mesh.{axis}", self.mesh[axis], problem, fix)

    def check_slices(self) -> None:
        """An axis goes over whole slices."""
        for axis in ("data", "fsdp"):
            slices, size = self.mesh[f"dcn_{axis}"], self.mesh[axis]
            if slices is not None and size != -1 and size % slices:
                self.problem(
                    f"mesh.dcn_{axis}", slices,
                    f"mesh.{axis} = {size} does not divide over so many slices",
                    f"set {math.gcd(size, slices)}, or another mesh.{axis}",
                )  # fmt: skip

    def check_context(self) -> None:
        """Rows are padded to 64 tokens, and a device takes two parts of a row."""
        context = self.mesh["context"]
        if context != -1 and 32 % context:
            nearest = 1 << min(5, max(0, context.bit_length() - 1))
            self.problem(
                "mesh.context", context,
                "rows are multiples of 64 tokens, cut into two parts for each device",
                f"set 1, 2, 4, 8, 16 or 32: the nearest is {nearest}",
            )  # fmt: skip

    def check_zero_stage(self) -> None:
        mesh, key = self.mesh, "deepspeed.zero_stage"
        stage = self.general[key]
        if stage is None:
            self.general[key] = 0 if mesh["fsdp"] == 1 else 3
        elif stage == 3 and mesh["fsdp"] == 1 and mesh["data"] != 1:
            self.problem(
                key, 3,
                "parameters are split over mesh.fsdp, which has size 1 as"
                f" mesh.data = {mesh['data']}",
                "unset mesh.data and mesh.fsdp, or set mesh.fsdp = -1",
            )  # fmt: skip
        elif stage < 3 and mesh["fsdp"] != 1:
            self.problem(
                "mesh.fsdp", mesh["fsdp"],
                f"this axis splits parameters, which zero_stage = {stage} keeps whole",
                "use mesh.data, or deepspeed.zero_stage = 3",
            )  # fmt: skip

    # --- lengths, model, data, dpo ----------------------------------------------------

    def resolve_lengths(self) -> None:
        """One max_length; DPO's own key wins, and a curriculum may set the default."""
        general, data, dpo = self.general, self.data, self.dpo
        enabled, end = general["curriculum.enabled"], general["curriculum.end_length"]
        key, length = "data.max_length", data["max_length"]
        if self.type == "dpo" and dpo["max_length"]:
            if length not in (None, dpo["max_length"]):
                self.notes.append(
                    f"data.max_length = {length} gives way to"
                    f" training.dpo.max_length = {dpo['max_length']}"
                )
            key, length = "training.dpo.max_length", dpo["max_length"]
        if length is None:
            length = end if enabled and end else DEFAULT_MAX_LENGTH
        data["max_length"] = dpo["max_length"] = length
        if not enabled:
            usual = schema.defaults(SCHEMA["training"])
            general |= {k: get(usual, k) for k in general if "curriculum." in k}
            end = None
        end = general["curriculum.end_length"] = end or length
        start = general["curriculum.start_length"]
        if enabled and start > end:
            self.problem(
                "curriculum.start_length", start,
                f"beyond curriculum.end_length = {end}", "set it no greater",
            )  # fmt: skip
        if enabled and end > length:
            self.problem(
                "curriculum.end_length", end, f"beyond {key} = {length}",
                f"lower it, or raise {key}",
            )  # fmt: skip
        longest = self.model["architecture"]["max_position_embeddings"]
        if self.type == "from_scratch" and length > longest:
            self.problem(
                key, length,
                f"beyond model.architecture.max_position_embeddings = {longest}",
                "lower it, or raise max_position_embeddings",
            )  # fmt: skip

    def check_model(self) -> None:
        prefix = "model.architecture"
        usual = schema.defaults(SCHEMA["model"])["architecture"]
        name = self.model["name_or_path"]
        if self.type == "from_scratch" and name:
            for key, value in self.model["architecture"].items():
                if value != usual[key]:
                    self.problem(
                        f"{prefix}.{key}", value,
                        f"model.name_or_path = {name!r} gives the sizes of this model",
                        "unset one of the two",
                    )  # fmt: skip
        if self.type != "from_scratch" or name:
            self.model["architecture"] = usual
        sizes = self.model["architecture"]
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        head_dim = sizes["head_dim"] or sizes["hidden_size"] // heads
        whole = sizes["head_dim"] or sizes["hidden_size"] % heads == 0
        sizes["head_dim"] = head_dim
        if self.type != "from_scratch" or name:
            return
        if heads % kv_heads:
            self.problem(
                f"{prefix}.num_key_value_heads", kv_heads,
                f"does not divide num_attention_heads = {heads}", "set a divisor",
            )  # fmt: skip
        if not whole:
            self.problem(
                f"{prefix}.hidden_size", sizes["hidden_size"],
                f"not a multiple of num_attention_heads = {heads}",
                "change one of them, or set head_dim",
            )  # fmt: skip
        elif head_dim % 2:
            self.problem(
                f"{prefix}.head_dim", head_dim, "rotary positions need pairs",
                "set an even one",
            )  # fmt: skip
        gemma = sizes["model_type"].startswith("gemma")
        read, other = ("hidden_activation", "hidden_act")[:: 1 if gemma else -1]
        if sizes[other] is not None:
            self.problem(
                f"{prefix}.{other}", sizes[other],
                f"{sizes['model_type']} does not read it", f"set {read} instead",
            )  # fmt: skip

    def take_objective_kwargs(self) -> None:
        """Check the objective's options, from `training.dpo` and `objective_kwargs`.

        An option that `training.dpo` has ends up there, whichever way it was given, so
        that whatever reads it there sees what the loss sees.
        """
        name, row = self.general["objective"], self.objective
        if row is None or (row.row_kind != "next_token") != (self.type == "dpo"):
            return  # check_objective says why
        own_kwargs = ":" in name  # those of a function of the user's own
        kwargs = {} if own_kwargs else dict(self.general["objective_kwargs"] or {})
        given = self.set_in_dpo(row.keys_of_dpo)
        twice = self.refuse_conflicts(row, given, kwargs)
        refused = {k for k in row.keys_of_dpo if f"training.dpo.{k}" in self.refused}
        chosen = {k: v for k, v in (given | kwargs).items() if k not in twice}
        options, problems = make_options(row.options, chosen, refused | twice)
        for key, line in problems:
            in_dpo = key in row.keys_of_dpo and key not in kwargs
            door = "training.dpo" if in_dpo else "training.objective_kwargs"
            self.problems.append(f"{door}.{line}")
        values = vars(options)
        if name == "kto" and values["precompute_ref_log_probs"]:
            self.problem(
                "training.objective_kwargs.precompute_ref_log_probs", True,
                "objective 'kto' has no pass that computes them", "unset it",
            )  # fmt: skip
        self.dpo |= {key: values[key] for key in row.keys_of_dpo}
        if not own_kwargs:
            beside = values.keys() & kwargs.keys() - set(row.keys_of_dpo)
            rest = {key: values[key] for key in kwargs if key in beside}
            self.general["objective_kwargs"] = rest or None

    def set_in_dpo(self, keys: Iterable[str]) -> dict[str, Any]:
        usual = schema.defaults(SCHEMA["training"]["dpo"])
        return {key: self.dpo[key] for key in keys if self.dpo[key] != usual[key]}

    def refuse_conflicts(
        self, row: ObjectiveRow, given: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> set[str]:
        """The options that have two values, one in each place."""
        again = {key: kwargs[key] for key in given.keys() & kwargs.keys()}
        values, wrong = schema.merge(schema.schema_of(row.options), again)
        twice = {key for key in again if key not in wrong and values[key] != given[key]}
        for key in sorted(twice):
            self.problem(
                f"training.objective_kwargs.{key}", kwargs[key],
                f"training.dpo.{key} = {given[key]!r} names the same option",
                "set one of the two",
            )  # fmt: skip
        return twice

    @property
    def objective(self) -> ObjectiveRow | None:
        """The facts about the objective, None where there is none of its name."""
        return objective_row(self.general["objective"], on_pairs=self.type == "dpo")

    def check_objective(self) -> None:
        """The objective fits the training type, and nothing set for DPO is ignored."""
        name, row = self.general["objective"], self.objective
        if row is None:
            self.problem(*unknown_objective(name, "auto"))
            return
        on_pairs = row.row_kind != "next_token"
        if on_pairs != (self.type == "dpo"):
            wanted = "dpo" if on_pairs else "sft"
            self.problem(
                "objective", name, f"training_type is {self.type!r}",
                f"set training_type = {wanted!r}, or objective = 'auto'",
            )  # fmt: skip
            return
        if not on_pairs:
            return
        read = {*row.keys_of_dpo, "max_length"}
        if row.row_kind == "preference":
            read.add("max_prompt_length")
        if row.has_reference:
            read |= {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
        ignored = [key for key in DpoSection.__dataclass_fields__ if key not in read]
        for key, value in self.set_in_dpo(ignored).items():
            self.problem(
                f"training.dpo.{key}", value,
                f"objective {name!r} does not read it",
                "unset it, or give what the objective reads in"
                " training.objective_kwargs",
            )  # fmt: skip

    def check_curriculum(self) -> None:
        general = self.general
        if not general["curriculum.enabled"]:
            return
        by_difficulty = general["curriculum.strategy"] == "difficulty_based"
        column = general["curriculum.column"]
        if column and not by_difficulty:
            self.problem(
                "curriculum.column", column, "strategy 'length_based' reads no column",
                "unset it, or set curriculum.strategy = 'difficulty_based'",
            )  # fmt: skip
        if by_difficulty and not column and self.type == "from_scratch":
            self.problem(
                "curriculum.strategy", "difficulty_based",
                "a model that knows nothing finds all rows alike",
                "name a column of numbers in curriculum.column, or set 'length_based'",
            )  # fmt: skip

    def check_data(self) -> None:
        data = self.data
        wants_pairs = self.type == "dpo"
        allowed = ["text", "prompt_completion", "messages"]
        if wants_pairs:
            labeled = self.objective and self.objective.row_kind == "labeled"
            allowed = ["preference", *(["labeled"] if labeled else [])]
        if data["format"] not in ("auto", *allowed):
            self.problem(
                "data.format", data["format"],
                f"training_type {self.type!r} trains on"
                f" {'preference rows' if wants_pairs else 'single texts'}",
                "set 'auto', or change training_type",
            )  # fmt: skip
        if data["packing"] is None:
            data["packing"] = self.type == "from_scratch"
        elif data["packing"] and self.type == "dpo":
            self.check_packed_pairs()
        if data["share_prompts"]:
            self.check_shared_prompts()
        if data["streaming"]:
            self.check_streaming()
        if data["assistant_only_loss"] and (
            self.type == "dpo" or data["format"] in ("text", "prompt_completion")
        ):
            self.problem(
                "data.assistant_only_loss", True, "only messages have assistant turns",
                "set it false, or train messages with sft or lora",
            )  # fmt: skip
        if data["completion_only_loss"] and data["format"] == "text":
            self.problem(
                "data.completion_only_loss", True, "plain text has no completion",
                "set it false, or data.format = 'prompt_completion'",
            )  # fmt: skip

    def check_streaming(self) -> None:
        """Refuse what needs all rows, or their number, before training."""
        general, dpo = self.general, self.dpo
        if general["max_steps"] == -1:
            self.problem(
                "data.streaming", True,
                "the length of a stream is not known, and the schedule needs the number"
                " of steps (num_train_epochs is not read)",
                f"set {self.origin['max_steps']}",
            )  # fmt: skip
        if general["curriculum.enabled"]:
            self.problem(
                "curriculum.enabled", True,
                "a curriculum chooses among all rows, which a stream never holds",
                "set it false, or data.streaming = false",
            )  # fmt: skip
        if self.type == "dpo" and dpo["precompute_ref_log_probs"]:
            self.problem(
                "training.dpo.precompute_ref_log_probs", True,
                "it scores all rows before training, which a stream never holds",
                "set it false, or data.streaming = false",
            )  # fmt: skip
        if general["early_stopping_patience"] and general["eval_steps"] is None:
            self.problem(
                "eval_steps", None,
                "a stream has no known epoch after which to evaluate, and"
                " early_stopping_patience is set",
                "set a number of steps",
            )  # fmt: skip
        for key in ("eval_steps", "save_steps"):
            if general[key] is None:
                self.notes.append(
                    f"{self.origin[key]} is unset: with data.streaming only at the end,"
                    " for a stream has no known epoch"
                )
        if self.data["cache"]:
            self.notes.append(
                "data.cache = True keeps evaluation rows only: data.streaming tokenizes"
                " training rows as they come"
            )

    def check_shared_prompts(self) -> None:
        """Only pairs have a prompt to share."""
        problem = None
        if self.type != "dpo":
            problem = f"training_type {self.type!r} has single texts, not pairs"
        elif self.objective and self.objective.row_kind == "labeled":
            name = self.general["objective"]
            problem = f"objective {name!r} takes single completions, not pairs"
        if problem:
            self.problem("data.share_prompts", True, problem, "set it false")

    def check_packed_pairs(self) -> None:
        """Several pairs a row: only what sums by pair can read them."""
        dpo, objective = self.dpo, self.general["objective"]
        by_length = self.general["curriculum.strategy"] == "length_based"
        for is_wrong, problem in (
            (not (self.objective and self.objective.packs),
             f"objective {objective!r} takes a pair a row"),
            (dpo["ld_alpha"] is not None, "training.dpo.ld_alpha takes a pair a row"),
            (dpo["precompute_ref_log_probs"],
             "training.dpo.precompute_ref_log_probs keeps one sum a row"),
            (self.general["curriculum.enabled"] and by_length,
             "a length_based curriculum takes a pair a row"),
        ):  # fmt: skip
            if is_wrong:
                self.problem(
                    "data.packing", True, problem, "set it false, or unset that"
                )

    def check_dpo(self) -> None:
        """What `training.dpo` says of the data and of the reference model."""
        dpo = self.dpo

        def refuse(key: str, problem: str, fix: str, *reads: str) -> None:
            self.problem(f"training.dpo.{key}", dpo[key], problem, fix, *reads)

        if dpo["max_prompt_length"] and dpo["max_prompt_length"] >= dpo["max_length"]:
            refuse(
                "max_prompt_length",
                f"leaves no room for a completion in max_length = {dpo['max_length']}",
                "lower it, raise max_length, or unset it",
                "training.dpo.max_length", "data.max_length",
            )  # fmt: skip
        if dpo["sync_ref_model"] and dpo["reference_free"]:
            problem = "reference_free is true: no reference"
            refuse("sync_ref_model", problem, "set it false")
        if dpo["sync_ref_model"] and dpo["precompute_ref_log_probs"]:
            refuse(
                "sync_ref_model", "precomputed log-probs are of a fixed reference",
                "set it false, or precompute_ref_log_probs = false",
            )  # fmt: skip
