"""Builds the judge that a recipe describes, behind its cache."""

from ray_abliterate.evaluation.judges.cache import CachedJudge, default_judgement_folder
from ray_abliterate.evaluation.judges.classifier import ClassifierJudge
from ray_abliterate.evaluation.judges.endpoint import EndpointJudge
from ray_abliterate.evaluation.judges.judge import Judge
from ray_abliterate.recipe import RefusalJudge


def build_judge(settings: RefusalJudge, device: str | None = None) -> Judge:
    """Build the judge that a recipe describes, without loading or asking anything yet.

    Args:
        settings: The recipe's `refusal-judge` scorer.
        device: Device that a classifier computes on; if None, a GPU if there is one.
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
