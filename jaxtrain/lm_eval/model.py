"""`JaxtrainLM`: what the lm-evaluation-harness asks of a model, by a `LoadedModel`.

What is read, cut and scored is what the harness's own `hf` model reads, cuts and
scores, token for token. `jaxtrain.lm_eval` is the command.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import assets
from jaxtrain.batch import Batch
from jaxtrain.config import default_config
from jaxtrain.evaluation import generate
from jaxtrain.evaluation.inference import unpacked_rows
from jaxtrain.model_manager import LoadedModel, ModelManager
from jaxtrain.models import hf
from jaxtrain.types import Params

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "jaxtrain.lm_eval needs the lm-evaluation-harness: pip install"
        " 'jaxtrain[lm-eval]'"
    ) from error

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHORTEST_ROW = 16
_DEFAULT_NEW_TOKENS = 256  # the harness's
# Names by which task files ask for a number of tokens; the first given counts.
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")
# Generation settings that change nothing at these values; at others they are refused.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


def load(
    model: str = "",
    *,
    dtype: str = "auto",
    revision: str | None = None,
    fsdp: int = 1,
    tensor: int = 1,
) -> LoadedModel:
    """A model over all devices: rows over `mesh.data`, weights as told.

    Args:
        model: a local Hugging Face directory or a hub name; "": the embedded model.
        dtype: of the computation: float32, bfloat16, float16, or auto, which is the
            type that config.json says the weights are kept in.
        fsdp: devices that share the weights and split the rows among them.
        tensor: devices that split heads, MLP and vocabulary.

    Raises:
        ValueError: there is no such model, or it can't be laid out so.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    model = model or str(assets.asset_path(assets.MODEL))
    directory = hf.resolve_model_path(model, revision=revision)
    limit = hf.load_config(directory).longest_text
    if dtype == "auto":
        dtype = hf.stored_dtype(directory)
    config = default_config()
    config.model.name_or_path = str(directory)
    config.model.param_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    config.training.bf16, config.training.fp16 = dtype == "bfloat16", dtype == "float16"
    config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
    config.data.max_length = limit
    return ModelManager(config).load_model()


@register_model("jaxtrain")
class JaxtrainLM(TemplateLM):
    """What the harness asks of a model, by a `LoadedModel`.

    Each process of a run calls it with the same requests and gets all the answers.
    """

    def __init__(
        self,
        model: str | LoadedModel = "",
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = _DEFAULT_NEW_TOKENS,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        """Load `model` with `load`'s options, or take one that is loaded.

        Args:
            batch_size: rows at once, over all devices; rounded up to a multiple of
                those that rows are split over.
            max_length: tokens of context and continuation; by default the model's.
            max_gen_toks: new tokens where a task says no number.
            seed: of tasks that sample.

        Raises:
            ValueError: see `load`; or batch_size is no number.
        """
        super().__init__()
        for ignored in ("device", "max_batch_size"):  # the harness's, for torch
            loading.pop(ignored, None)
        name = loading.pop("pretrained", model)  # hf's name of it
        self.model = load(name, **loading) if isinstance(name, str) else name
        self.tokenizer = self.model.tokenizer
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"batch_size={batch_size!r}: give a number of rows")
        self.batch_size = self.model.plan.fill_up(int(batch_size))
        limit = self.model.config.longest_text
        self.max_length = max_length or limit
        if self.max_length > limit:
            raise ValueError(
                f"max_length={max_length} exceeds the model's {limit} positions: lower"
                " it"
            )
        self.max_gen_toks = max_gen_toks
        self._key = jax.random.key(seed)
        self._generators: dict[Any, generate.Generator] = {}

    # --- text and tokens --------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the first token, or else the last."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens, with those that begin a text unless it has its first one already."""
        if add_special_tokens is None:
            first = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(first)
        encoded = self.tokenizer(string, add_special_tokens=add_special_tokens)
        known, ids = self.model.config.vocab_size, list(encoded["input_ids"])
        generate.refuse_unknown(self.tokenizer, ids, "a text of the task", known)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model's chat template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes beside its results."""
        return {
            "model_num_parameters": self.model.config.num_params(),
            "model_dtype": self.model.decoder.compute_dtype,
        }

    # --- likelihood -------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, is it the greedy choice) of each continuation.

        A request is its texts, the context's tokens and the continuation's. The
        beginning of what exceeds `max_length` is cut off.
        """
        documents = []  # each with the first position whose prediction counts
        for _texts, context, answer in requests:
            tokens = [*context, *answer][-self.max_length - 1 :]
            documents.append((tokens, len(tokens) - 1 - len(answer)))
        # The longest first: memory that does not suffice shows at once.
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i][0]))
        params = self.model.on_device(self.model.params)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(documents)
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            longest = len(documents[members[0]][0]) - 1
            width = max(1 << (longest - 1).bit_length(), _SHORTEST_ROW)
            shape = (self.batch_size, width)
            batch = unpacked_rows([documents[i] for i in members], shape)
            logps, greedy = jax.device_get(self._score(params, self._place(batch)))
            for index, logp, is_greedy in zip(members, logps, greedy, strict=False):
                results[index] = (float(logp), bool(is_greedy))
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[index])
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability (nats) of whole texts, in windows of `max_length` tokens."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(part)) for part in parts]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @functools.cached_property
    def _score(self) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
        decoder = dataclasses.replace(self.model.decoder, packed=False)

        def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            outputs = decoder.token_log_probs(params, batch)
            scored = batch.loss_mask > 0
            logps = jnp.where(scored, outputs.logps, 0).sum(axis=1)
            return logps, jnp.where(scored, outputs.correct > 0, True).all(axis=1)

        plan = self.model.plan
        return plan.jit(score, out_shardings=plan.replicated)

    def _place(self, batch: Batch) -> Batch:
        """Rows over the devices; every process holds all rows and gives its own."""
        make, layout = jax.make_array_from_callback, self.model.plan.batch()
        return jax.tree.map(lambda x: make(x.shape, layout, x.__getitem__), batch)

    # --- generation -------------------------------------------------------------------

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Continue each context up to its first stop text, which is left out."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            same = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(same, []).append(index)
        params = self.model.on_device(self.model.params)
        for members in groups.values():
            arguments = requests[members[0]].args[1]
            settings, stops = self._read_settings(arguments)
            room = self.max_length - settings["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={settings['max_new_tokens']} leaves no room for a"
                    f" context in max_length={self.max_length}: lower it"
                )
            contexts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            rows = generate.generate_tokens(
                self._generator(settings, stops),
                params,
                [context or [self.prefix_token_id] for context in contexts],
                key=self._key,
                batch_size=self.batch_size,
            )
            for index, row in zip(members, rows, strict=True):
                texts[index] = self._cut(row, stops)
                self.cache_hook.add_partial(
                    "generate_until", requests[index].args, texts[index]
                )
        return texts

    def _read_settings(
        self, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The generator's settings and the stop texts of a task's `generation_kwargs`.

        Raises:
            ValueError: a setting that we do not have.
        """
        rest = dict(arguments)
        until = rest.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        limits = [rest.pop(name, None) for name in _TOKEN_LIMITS]
        limits = [limit for limit in limits if limit is not None]
        temperature = float(rest.pop("temperature", 0.0) or 0.0)
        top_k = int(rest.pop("top_k", 0) or 0)
        top_p = float(rest.pop("top_p", 1.0) or 1.0)
        do_sample = rest.pop("do_sample", temperature > 0)
        if do_sample and not temperature:
            raise ValueError(
                "generation_kwargs: do_sample=True with temperature=0 samples nothing;"
                " give a temperature above 0, or do_sample: false"
            )
        settings = {
            "max_new_tokens": int(limits[0]) if limits else self.max_gen_toks,
            "temperature": temperature if do_sample else 0.0,
            "top_k": top_k if do_sample else 0,
            "top_p": top_p if do_sample else 1.0,
        }
        unknown = {k: v for k, v in rest.items() if _NEUTRAL.get(k) != v}
        if unknown:
            raise ValueError(
                f"generation_kwargs: {unknown} is not supported; these are: until,"
                f" {', '.join(_TOKEN_LIMITS)}, do_sample, temperature, top_k, top_p"
            )
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        return settings, tuple(dict.fromkeys([*filter(None, stops), end]))

    def _generator(
        self, settings: Mapping[str, Any], stops: Sequence[str]
    ) -> generate.Generator:
        """A generator for which a token with a stop text in it ends a row too."""
        key = (*settings.values(), *stops)
        if key not in self._generators:
            ends = set(self.model.eos_ids)
            for token, text in enumerate(self._texts_of_tokens):
                if any(stop in text for stop in stops):
                    ends.add(token)
            self._generators[key] = generate.make_generate(
                self.model.decoder,
                eos_ids=sorted(ends),
                pad_id=self.tokenizer.pad_token_id,
                **settings,
            )
        return self._generators[key]

    @functools.cached_property
    def _texts_of_tokens(self) -> list[str]:
        ids = [[token] for token in range(len(self.tokenizer))]
        return self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)

    def _cut(self, row: np.ndarray, stops: Sequence[str]) -> str:
        ids = generate.until_end(row, self.model.eos_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        return text
