"""The model that a recipe or a command names: an embedded one, a folder, or one on the Hub."""

from collections.abc import Callable

from ray_abliterate.data.builtin import demo_model as demo
from ray_abliterate.data.builtin import planted_model as planted
from ray_abliterate.model.loading import refuse_missing_model


def model_source(
    name: str, note: Callable[[str], None], elsewhere: bool = False, field: str = "model.name"
) -> str:
    """The folder or Hub name behind a model's name; `demo` and `planted` are built if need be.

    Args:
        name: Of the model.
        note: Is told what stands in for the demo's model.
        elsewhere: It is loaded on other machines, which may have a folder that this one lacks.
        field: What gave the name, for errors.

    Raises:
        ModelError: no model can be there.
    """
    if name == "demo":
        try:
            return str(demo.build_demo_model(demo.demo_folder()))
        except demo.DemoUnavailable as error:
            note(str(error))
            note("the tiny planted model stands in for the demo's; its scores mean nothing")
            return str(planted.build_planted_model(planted.planted_folder()))
    if name == "planted":
        return str(planted.build_planted_model(planted.planted_folder()))
    refuse_missing_model(name, elsewhere, field)
    return name
