"""jaxtrain: train language models from scratch, by SFT, LoRA and DPO, in JAX."""

__version__ = "0.1.0"
