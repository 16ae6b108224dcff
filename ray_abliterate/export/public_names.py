"""Names under which others can find a model, for what leaves this machine: never a path of it."""

from dataclasses import dataclass
from pathlib import Path

from ray_abliterate.pipeline.directory import RunDirectory

EMBEDDED = ("demo", "planted")
"""Models that come with the program."""


@dataclass(frozen=True)
class PublicName:
    """What a model is called in public.

    Attributes:
        name: Its name on the Hub, or that of an embedded model; None for a folder.
        called: The name to show: the same, or the last part of the folder's path.
        revision: Commit on the Hub, if it is known.
    """

    name: str | None
    called: str
    revision: str | None

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> "PublicName":
        """Return the public name of a model that is loaded as `name`.

        Args:
            name: A folder, a Hub name, or an embedded model's name.
            revision: Commit on the Hub, if it is known.
        """
        if name in EMBEDDED:
            return cls(name, f"the {name} model of ray-abliterate", revision)
        if Path(name).exists():
            return cls(None, Path(name).resolve().name, revision)
        return cls(name, name, revision)

    @classmethod
    def searched(cls, directory: RunDirectory) -> "PublicName":
        """Return the public name of the model that a run searched on."""
        revision = directory.read_environment()["model"].get("revision")
        return cls.of(directory.read_recipe().model.name, revision)

    @property
    def hub(self) -> str | None:
        """The model's name on the Hub; None if it is not there."""
        return None if self.name in EMBEDDED else self.name
