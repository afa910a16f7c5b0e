"""Rules of a model made from scratch: which sizes fit together."""

from dataclasses import asdict, replace

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import ArchitectureSection, ModelSection

_PREFIX = "model.architecture."


def resolve_model(model: ModelSection, found: Resolution) -> ModelSection:
    """Check the sizes of a model made from scratch; others have their own."""
    sizes, usual = model.architecture, ArchitectureSection()
    from_scratch = found.training_type == "from_scratch"
    if from_scratch and model.name_or_path:
        defaults = asdict(usual)
        for name, value in asdict(sizes).items():
            if value != defaults[name]:
                found.add(
                    _PREFIX + name,
                    f"model.name_or_path = {model.name_or_path!r} gives the sizes of"
                    " this model",
                    "unset one of the two",
                )
    if not from_scratch or model.name_or_path:
        sizes = usual
    else:
        _check_sizes(sizes, found)
    head_dim = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    return replace(model, architecture=replace(sizes, head_dim=head_dim))


def _check_sizes(sizes: ArchitectureSection, found: Resolution) -> None:
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    count = _PREFIX + "num_attention_heads"
    if heads % kv_heads:
        found.add(
            _PREFIX + "num_key_value_heads",
            f"does not divide num_attention_heads = {heads}",
            "set a divisor",
            causes=[count],
        )
    head_dim = sizes.head_dim or sizes.hidden_size // heads
    if not sizes.head_dim and sizes.hidden_size % heads:
        found.add(
            _PREFIX + "hidden_size",
            f"not a multiple of num_attention_heads = {heads}",
            "change one of them, or set head_dim",
            causes=(count, _PREFIX + "head_dim"),
        )
    elif head_dim % 2:
        found.add(
            _PREFIX + "head_dim",
            "rotary positions need pairs",
            "set an even one",
            value=head_dim,
            causes=(count, _PREFIX + "hidden_size"),
        )
    is_gemma = sizes.model_type.startswith("gemma")
    read, other = ("hidden_activation", "hidden_act")[:: 1 if is_gemma else -1]
    if getattr(sizes, other) is not None:
        found.add(
            _PREFIX + other,
            f"{sizes.model_type} does not read it",
            f"set {read} instead",
            causes=[_PREFIX + "model_type"],
        )
