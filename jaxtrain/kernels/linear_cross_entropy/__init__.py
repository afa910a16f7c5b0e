"""The loss head: log-probs of targets without the logits of the whole batch."""

from jaxtrain.kernels.linear_cross_entropy.api import linear_log_probs

__all__ = ["linear_log_probs"]
