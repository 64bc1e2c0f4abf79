"""The head of a card, which the hub reads. huggingface_hub's own classes write it, so that foreign text stays text."""

import math
from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCardData

from mixora.cards.facts import Facts, is_hub_id, show_name
from mixora.cards.text import on_one_line
from mixora.recipes import recipe_names

PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}


def write_front_matter(facts: Facts, library: str, tags: list[str], title: str, has_results: bool) -> str:
    """YAML without its marks. `has_results`: the scores of the run are those of what the card is of."""
    results = list(_results_of(facts)) if has_results else []
    data = ModelCardData(
        base_model=facts.base_id,
        library_name=library,
        license=facts.licence,
        tags=["mixora", *tags, *([facts.recipe] if facts.recipe in recipe_names() else [])],
        datasets=[source for source in facts.sources if is_hub_id(source)] or None,
        pipeline_tag=PIPELINES.get(str(facts.task_type)),
        metrics=[result.metric_type for result in results] or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _results_of(facts: Facts) -> Iterator[EvalResult]:
    """Each score of the run over all its rows; those of several tasks are means."""
    if facts.record is None:
        return
    data = on_one_line(", ".join(map(show_name, facts.sources or [facts.record.data])))
    for metric, value in facts.record.after.items():
        if metric != "rows" and value is not None and math.isfinite(value):
            yield EvalResult(
                task_type=PIPELINES.get(str(facts.task_type), "text-generation"),
                dataset_type=data,
                dataset_name=data,
                metric_type=on_one_line(metric),
                metric_value=value,
            )
