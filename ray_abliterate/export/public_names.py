"""Models as others can find them, for what leaves this machine: never a path of it."""

from dataclasses import dataclass
from pathlib import Path

from ray_abliterate.pipeline.directory import RunDirectory

EMBEDDED = ("demo", "planted")
"""Models that come with the program."""


@dataclass(frozen=True)
class Published:
    """What a model is called in public.

    Attributes:
        name: On the Hub, or of an embedded model; None for a folder.
        called: The same, or the last part of the folder's path.
        revision: Commit on the Hub, if it is known.
    """

    name: str | None
    called: str
    revision: str | None

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> "Published":
        """A model by the name that it is loaded by: a folder, a Hub name or an embedded one's."""
        if name in EMBEDDED:
            return cls(name, f"the {name} model of ray-abliterate", revision)
        if Path(name).exists():
            return cls(None, Path(name).resolve().name, revision)
        return cls(name, name, revision)

    @classmethod
    def searched(cls, directory: RunDirectory) -> "Published":
        """The model that a run searched on."""
        revision = directory.read_environment()["model"].get("revision")
        return cls.of(directory.read_recipe().model.name, revision)

    @property
    def hub(self) -> str | None:
        """Its name on the Hub."""
        return None if self.name in EMBEDDED else self.name


@dataclass(frozen=True)
class Original:
    """The full-precision model whose weights an export edits.

    Attributes:
        folder: Where it is.
        base: What it is called.
        quantized: The quantized form of it that the run searched on, if that is another checkpoint.
    """

    folder: Path
    base: Published
    quantized: Published | None = None
