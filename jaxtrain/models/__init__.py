"""One decoder family, driven by the Hugging Face config."""

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import LoraShape
from jaxtrain.models.transformer import REMAT_POLICIES, Decoder

__all__ = ["REMAT_POLICIES", "Decoder", "LoraShape", "ModelConfig"]
