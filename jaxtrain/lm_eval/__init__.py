"""Our models in EleutherAI's lm-evaluation-harness, as the model `jaxtrain`.

    python -m jaxtrain.lm_eval --model=out/sft/model --tasks=arc_easy,hellaswag

Task files of your own: `--include_path=DIR`. From Python, import this module and give
`lm_eval.simple_evaluate` a `JaxtrainLM`, or `model="jaxtrain"`.
"""

from jaxtrain.lm_eval.model import JaxtrainLM, load

__all__ = ["JaxtrainLM", "load"]
