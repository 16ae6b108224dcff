"""Resolves the name of a model: a built-in one, a folder, or one on the Hub."""

from collections.abc import Callable

from ray_abliterate.data.builtin import demo_model, planted_model
from ray_abliterate.model.loading import refuse_missing_model


def resolve_model(
    name: str, note: Callable[[str], None], elsewhere: bool = False, field: str = "model.name"
) -> str:
    """Return the folder or Hub name behind a model's name; build `demo` and `planted` if need be.

    Args:
        name: The model's name.
        note: Is called with what stands in for the demo's model, if anything does.
        elsewhere: Accept an absolute path that this machine lacks; others, which load it, may have
            it.
        field: The setting that gave the name, for errors.

    Raises:
        ModelError: no model can be there.
    """
    if name == "demo":
        try:
            return str(demo_model.build_demo_model(demo_model.demo_folder()))
        except demo_model.DemoUnavailable as error:
            note(str(error))
            note("the tiny planted model stands in for the demo's; its scores mean nothing")
            return str(planted_model.build_planted_model(planted_model.planted_folder()))
    if name == "planted":
        return str(planted_model.build_planted_model(planted_model.planted_folder()))
    refuse_missing_model(name, elsewhere, field)
    return name
