"""Builds the judge that a recipe describes, behind its cache."""

from ray_abliterate.evaluation.judges.cache import CachedJudge, default_judgement_folder
from ray_abliterate.evaluation.judges.classifier import ClassifierJudge
from ray_abliterate.evaluation.judges.endpoint import EndpointJudge
from ray_abliterate.evaluation.judges.judge import Judge
from ray_abliterate.recipe import RefusalJudge


def build_judge(settings: RefusalJudge, device: str | None = None) -> Judge:
    """The judge that a recipe describes, behind its cache; nothing is loaded or asked yet.

    Args:
        settings: As the recipe has them.
        device: Where a classifier computes; on a GPU if there is one, unless it is given.
    """
    judge: Judge
    if settings.endpoint is not None:
        judge = EndpointJudge(
            settings.endpoint,
            str(settings.endpoint_model),
            settings.key_variable,
            settings.timeout_seconds,
        )
    else:
        judge = ClassifierJudge(
            str(settings.classifier),
            settings.revision,
            settings.label,
            settings.hypothesis,
            settings.sees_prompt,
            device,
        )
    if not settings.cache:
        return judge
    return CachedJudge(judge, default_judgement_folder())
