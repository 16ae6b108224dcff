"""The saved state of an evaluation: one safetensors file, written atomically.

Its tensors are what the model remembers of the text; its metadata say how far the text was read,
the totals so far, and which model, text and settings they are of.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.errors import EvaluationChanged
from ray_abliterate.evaluation.streaming.results import Totals

VERSION = 1


@dataclass(frozen=True)
class SavedState:
    """How far an evaluation has come.

    Attributes:
        identity: The model, the text and the settings.
        totals: Totals of the chunks so far.
        next_chunk: Number of the first chunk that is not in the totals.
        losses_bytes: Size of the file of token losses.
        tensors: What the model remembers of the text.
        rest: What it remembers apart from tensors; None if the text has to be read again.
    """

    identity: dict[str, Any]
    totals: Totals
    next_chunk: int
    losses_bytes: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rest: list[dict[str, Any]] | None = None

    def write(self, path: Path) -> None:
        """Write the state to a file, atomically."""
        values = {
            "version": VERSION,
            "identity": self.identity,
            "totals": self.totals.to_json(),
            "next_chunk": self.next_chunk,
            "losses_bytes": self.losses_bytes,
            "rest": self.rest,
        }
        write_atomically(path, save(self.tensors, {"evaluation": json.dumps(values)}))

    @classmethod
    def read(cls, path: Path, identity: dict[str, Any]) -> "SavedState | None":
        """Read the state from a file; return None if the file does not exist.

        Args:
            path: The file.
            identity: The model, the text and the settings that the state has to be of.

        Raises:
            EvaluationChanged: the state is of another model, text or setting, or can't be read.
        """
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                values = json.loads((file.metadata() or {})["evaluation"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, ValueError) as error:
            raise EvaluationChanged(
                f"state = {str(path)!r} is no saved evaluation ({error}).\n"
                "  Delete it to begin anew, or name another file."
            ) from None
        _refuse_changed(path, values, identity)
        return cls(
            identity,
            Totals.from_json(values["totals"]),
            values["next_chunk"],
            values["losses_bytes"],
            tensors,
            values["rest"],
        )


def _refuse_changed(path: Path, values: dict[str, Any], identity: dict[str, Any]) -> None:
    saved = {**values["identity"], "version": values["version"]}
    wanted = {**identity, "version": VERSION}
    changed = [name for name in wanted if saved.get(name) != wanted[name]]
    if changed:
        lines = [f"    {name}: {saved.get(name)!r} saved, {wanted[name]!r} now" for name in changed]
        raise EvaluationChanged(
            f"state = {str(path)!r} is the saved state of another evaluation:\n"
            + "\n".join(lines)
            + "\n"
            "  Use the saved settings again, or delete the file to begin anew."
        )
