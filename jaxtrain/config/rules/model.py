"""Rules of a model made from scratch: which sizes fit together."""

from dataclasses import asdict, replace

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import ArchitectureSection
from jaxtrain.models.families import FAMILIES
from jaxtrain.record.safe_text import shown

_PREFIX = "model.architecture."


def resolve_model(run: Resolution) -> None:
    """Check the sizes of a model made from scratch; others have their own."""
    name, sizes = run.model.name_or_path, run.model.architecture
    usual = ArchitectureSection()
    from_scratch = run.training_type == "from_scratch"
    if from_scratch and name:
        problem = f"model.name_or_path = {shown(name)} gives the sizes of this model"
        for key, default in asdict(usual).items():
            is_flag = _PREFIX + key in run.flags
            if getattr(sizes, key) != default or is_flag:
                run.problem(_PREFIX + key, f"{problem}; unset one of the two")
    elif from_scratch:
        _check_sizes(run)
    if not from_scratch or name:
        sizes = usual
    head_dim = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    run.model = replace(run.model, architecture=replace(sizes, head_dim=head_dim))


def _check_sizes(run: Resolution) -> None:
    sizes = run.model.architecture
    heads, width = sizes.num_attention_heads, sizes.hidden_size
    count = _PREFIX + "num_attention_heads"
    if heads % sizes.num_key_value_heads:
        text = f"does not divide num_attention_heads = {heads}; set a divisor"
        run.problem(_PREFIX + "num_key_value_heads", text, causes=[count])
    head_dim = sizes.head_dim or width // heads
    if not sizes.head_dim and width % heads:
        run.problem(
            _PREFIX + "hidden_size",
            f"not a multiple of num_attention_heads = {heads}; change one of them, or"
            " set head_dim",
            causes=(count, _PREFIX + "head_dim"),
        )
    elif head_dim % 2:
        run.problem(
            _PREFIX + "head_dim",
            "rotary positions need pairs; set an even one",
            value=head_dim,
            causes=(count, _PREFIX + "hidden_size"),
        )
    read = FAMILIES[sizes.model_type].activation_key
    other = "hidden_act" if read == "hidden_activation" else "hidden_activation"
    if getattr(sizes, other) is not None:
        text = f"{sizes.model_type} does not read it; set {read} instead"
        run.problem(_PREFIX + other, text, causes=[_PREFIX + "model_type"])
