"""What a model's weights amount to: their shapes, and the operations of a token."""

import functools
import math
from collections.abc import Mapping

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.decoder_layer import MIXERS
from jaxtrain.models.layer_kinds import config_of_kind, kinds_of
from jaxtrain.models.stacks import LAYERS
from jaxtrain.models.transformer import Decoder
from jaxtrain.tree import flatten


@functools.cache
def weight_shapes(config: ModelConfig) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    """The shape of each weight by its path; those of layers are stacked on axis 0."""
    params = flatten(Decoder(config).abstract_params())
    return {path: leaf.shape for path, leaf in params.items()}


def training_flops(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs (forward and backward) a token in rows of `seq_len` tokens.

    6 N + 12 sum_layers N_heads H min(S, window): each weight of a matrix product
    costs a multiply and an add forward and twice that backward (arXiv:2001.08361);
    N counts the projections and the unembedding once, not the embedding lookup, and
    of the experts those that a token is sent to.
    Scores and weighted values cost 4 N_heads H S forward (arXiv:2204.02311,
    appendix B). As there, causality is not discounted and rematerialization not
    counted, so that an MFU from this can be compared with published ones. What mixers
    without attention cost beside their weights, `Mixer.flops` says.
    """
    matmul_params = config.vocab_size * config.hidden_size
    for path, shape in weight_shapes(config).items():
        if path[0] == LAYERS and _is_matrix(path, shape):  # one in each layer
            is_expert = "experts" in path
            used = config.num_experts_per_tok / config.num_experts if is_expert else 1
            matmul_params += round(math.prod(shape) * used)
    mixing = 0
    for kind, layer_type in zip(kinds_of(config), config.layer_types, strict=True):
        own = config_of_kind(config, kind)
        keys_read = min(seq_len, own.window_of(layer_type) or seq_len)
        mixing += MIXERS[kind.mixer].flops(own, keys_read)
    return float(6 * matmul_params + 3 * mixing)


def _is_matrix(path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether a weight, stacked over layers, is a matrix of each.

    Experts' biases have as many axes, because they are stacked over experts too.
    """
    return len(shape) > 2 and not path[-1].endswith("_bias")
