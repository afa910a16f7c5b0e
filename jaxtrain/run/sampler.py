"""The sampler of a run: which held-out prompts it continues, and how."""

from jaxtrain.config import RunConfig
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.evaluation.samples import Sampler, read_prompts
from jaxtrain.evaluation.text_metrics import check_text_metric, make_text_metric
from jaxtrain.models.load import LoadedModel


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


def make_sampler(run: RunConfig, model: LoadedModel, data: PreparedDataset) -> Sampler:
    """Make what generates texts for `run.generation` from the rows of `data`.

    Raises:
        ValueError: the rows hold no prompt, or a metric can't be had.
    """
    settings = run.generation
    generator = model.make_generator(
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )
    sampler = Sampler(
        generator,
        model.tokenizer,
        read_prompts(
            data,
            model.tokenizer,
            settings.num_prompts,
            new_tokens=generator.max_new_tokens,
        ),
        [
            make_text_metric(name, bertscore_model=settings.bertscore_model)
            for name in settings.metrics
        ],
        batch_size=model.plan.fill_up(settings.batch_size),
        num_logged=settings.num_samples_logged,
        seed=run.loop.seed,
    )
    if not sampler.prompts:
        raise ValueError(
            "training.generation.enabled = True: no evaluation row has a prompt"
            " with an answer; set it false, or give other data.eval"
        )
    return sampler
