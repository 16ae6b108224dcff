"""What the recipe is made of: closed sections of settings, and what several of them share.

Knows nothing about what the sections say; see `recipe/recipe.py`.
"""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

Goal = Literal["minimize", "maximize", "report"]

PLUGIN = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


class Section(BaseModel):
    """A section of the recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
