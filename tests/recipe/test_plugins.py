"""Objects that a recipe names as `module:attribute`."""

import pytest

from ray_abliterate.errors import ScoreError
from ray_abliterate.recipe.plugins import resolve
from ray_abliterate.search.score import wilson


def test_a_name_of_module_and_attribute_finds_the_object():
    assert resolve("ray_abliterate.search.score:wilson") is wilson


@pytest.mark.parametrize(
    ("spec", "part"),
    [("no_such_module_anywhere:X", "cannot be imported"), ("json:nope", "has no 'nope'")],
)
def test_an_attribute_that_is_not_there_is_named(spec, part):
    with pytest.raises(ScoreError, match=part):
        resolve(spec)
