"""The sampler of a run: which held-out prompts it continues, and how."""

from collections.abc import Callable, Mapping

from jaxtrain.config import RunConfig, eval_sets
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.evaluation.samples import Sampler, read_prompts
from jaxtrain.evaluation.sets import add_scores
from jaxtrain.evaluation.text_metrics import check_text_metric, make_text_metric
from jaxtrain.models.load import LoadedModel
from jaxtrain.run.row_metrics import make_row_metrics
from jaxtrain.types import Params


def check_metrics(run: RunConfig) -> None:
    """Refuse a text metric that cannot be had, before anything is loaded.

    Raises:
        ValueError: no such function, a missing library, or BERTScore's encoder.
    """
    model = run.generation.bertscore_model
    for name in run.generation.metrics:
        try:
            check_text_metric(name, bertscore_model=model)
        except (ValueError, ImportError) as error:
            raise ValueError(f"training.generation.metrics: {error}") from error


def make_sampler(
    run: RunConfig, model: LoadedModel, sets: Mapping[str, PreparedDataset]
) -> Callable[[Params], tuple[dict[str, float], dict[str, str]]]:
    """Make what measures the rows of each set beyond the loss: texts, own metrics.

    The scores and texts of a named set bear its name: those of the set `helpful` are
    `helpful_bleu` and `helpful/sample_1/output`. One generator, compiled once, serves
    all sets.

    Raises:
        ValueError: a set's rows hold no prompt, or a metric can't be had.
    """
    samplers = _make_samplers(run, model, sets) if run.generation.enabled else {}
    measure = make_row_metrics(run, model) if run.loop.row_metrics else None

    def sample(params: Params) -> tuple[dict[str, float], dict[str, str]]:
        scores: dict[str, float] = {}
        texts: dict[str, str] = {}
        for name, data in sets.items():
            found, written = samplers[name](params) if samplers else ({}, {})
            if measure is not None:
                add_scores(found, measure(params, data), prefix="")
            scores |= {f"{name}_{n}" if name else n: x for n, x in found.items()}
            texts |= {f"{name}/{n}" if name else n: x for n, x in written.items()}
        return scores, texts

    return sample


def _make_samplers(
    run: RunConfig, model: LoadedModel, sets: Mapping[str, PreparedDataset]
) -> dict[str, Sampler]:
    """What generates texts from the prompts of each set."""
    settings = run.generation
    generator = model.make_generator(
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )
    metrics = [
        make_text_metric(name, bertscore_model=settings.bertscore_model)
        for name in settings.metrics
    ]
    samplers = {}
    for name, data in sets.items():
        prompts = read_prompts(
            data,
            model.tokenizer,
            settings.num_prompts,
            new_tokens=generator.max_new_tokens,
        )
        if not prompts:
            raise ValueError(
                "training.generation.enabled = True: no evaluation row has a prompt"
                f" with an answer; set it false, or give other {eval_sets.key_of(name)}"
            )
        samplers[name] = Sampler(
            generator,
            model.tokenizer,
            prompts,
            metrics,
            batch_size=model.plan.fill_up(settings.batch_size),
            num_logged=settings.num_samples_logged,
            seed=run.loop.seed,
        )
    return samplers
