"""Rules of adapters, and of the frozen base in few bits."""

import re
from dataclasses import replace

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import Quantization

_TAKEN_FROM_THE_BASE = ("pissa", "olora")
_ALL = "all-linear"


def resolve_lora(run: Resolution) -> None:
    """Decide whether adapters train, and in which kind of base."""
    lora = run.lora
    if run.training_type == "lora" and lora.enabled is False:
        run.problem(
            "training.lora.enabled",
            "training_type is 'lora'; set it true, or train all parameters with"
            " training_type 'sft'",
        )
    if run.training_type == "from_scratch" and lora.enabled:
        run.problem(
            "training.lora.enabled",
            "adapters on random weights learn little: from_scratch trains all;"
            " set it false, or choose training_type sft, lora or dpo",
        )
    run.lora = replace(
        lora, enabled=run.has_adapters, target_modules=_modules(lora.target_modules)
    )
    if run.lora.enabled and not (lora.target_modules or lora.target_parameters):
        run.problem(
            "training.lora.target_modules",
            'no module would get an adapter; set "all-linear" or names such as'
            ' ["q_proj", "v_proj"]',
        )
    chosen = run.lora.target_modules
    if run.lora.enabled and not isinstance(chosen, str) and _ALL in chosen:
        run.problem(
            "training.lora.target_modules",
            f'"{_ALL}" stands alone; set it without other names, or name all modules',
        )
    _resolve_quantization(run)
    takes_base = run.lora.enabled and lora.init_lora_weights in _TAKEN_FROM_THE_BASE
    if takes_base and run.is_dpo and run.dpo.sync_ref_model:
        run.problem(
            "training.lora.init_lora_weights",
            "the reference holds the first adapters, which sync_ref_model moves;"
            " set it to default or gaussian, or sync_ref_model to false",
        )


def _modules(chosen: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Names are a list, one alone or several with commas, as on the command line.

    As a regular expression, which must match a whole name, a word would match nothing:
    a name is model.layers.0.self_attn.q_proj. A list of "all-linear" alone means it, as
    in TRL.
    """
    if isinstance(chosen, str) and re.fullmatch(r"\w+(\s*,\s*\w+)*,?", chosen.strip()):
        return tuple(name.strip() for name in chosen.split(",") if name.strip())
    return _ALL if chosen == (_ALL,) else chosen


def _resolve_quantization(run: Resolution) -> None:
    """One of the base's kinds, by our key or by transformers' names."""
    lora = run.lora
    asked: dict[str, Quantization | None] = {
        "quantization": lora.quantization,
        "load_in_4bit": lora.bnb_4bit_quant_type if lora.load_in_4bit else None,
        "load_in_8bit": "int8" if lora.load_in_8bit else None,
    }
    for name, its_kind in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        key = f"training.lora.{name}"
        if key in run.flags and not asked[name] and lora.quantization == its_kind:
            text = f"training.lora.quantization = {its_kind!r} asks for it; unset that"
            run.problem(key, text)
    named = [(f"training.lora.{name}", kind) for name, kind in asked.items() if kind]
    if run.precision.fp8 and lora.enabled and not named:
        named = [("training.fp8", "fp8")]
    if not named:
        return
    key, kind = named[0]
    if run.precision.fp8 != (kind == "fp8"):
        run.problem(
            key,
            "training.fp8 needs the quantization fp8 (or none that is named), and the"
            " quantization fp8 needs training.fp8; change one of the two",
            value=kind,
            causes=("training.fp8",),
        )
    if others := [name for name, other in named if other != kind]:
        text = f"{others[0]} asks for another; set one of them only"
        run.problem(key, text, value=kind)
    if not lora.enabled:
        run.problem(
            key,
            "a quantized base does not train, only adapters beside it; set"
            " training.lora.enabled = True (or training_type lora), or unset it",
            value=kind,
            causes=("training.lora.enabled", "training.training_type"),
        )
    if lora.quantization_block_size % 2:
        run.problem(
            "training.lora.quantization_block_size",
            "two codes make a byte; set an even number that divides the model's widths,"
            " such as 64",
        )
    if lora.init_lora_weights in _TAKEN_FROM_THE_BASE and not lora.init_from:
        run.problem(
            "training.lora.init_lora_weights",
            "it takes the first adapters out of the base, and the base's codes cannot"
            f" hold the difference; set it to default or gaussian, or unset {key}",
            causes=["training.lora.init_from"],
        )
    run.lora = replace(lora, quantization=kind)
