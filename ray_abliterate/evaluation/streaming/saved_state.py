"""The saved state of an evaluation: one safetensors file, written whole.

Its tensors are what the model keeps of the text; its metadata say where the text was, what was
found until there, and of what.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ray_abliterate.data.atomic_files import write_whole
from ray_abliterate.errors import EvaluationChanged
from ray_abliterate.evaluation.streaming.results import Totals
from ray_abliterate.model.quantization import plain_tensors

VERSION = 1
SAMPLE = 16
"""Values of each parameter that tell one model from another."""


@dataclass(frozen=True)
class SavedState:
    """Where an evaluation was.

    Attributes:
        identity: The model, the text and the settings.
        totals: Chunks until there.
        next_chunk: The first that is not among them.
        losses_bytes: Bytes of the file of token losses.
        tensors: What the model keeps of the text.
        rest: What of it is no tensor; None if the text is to be read again.
    """

    identity: dict[str, Any]
    totals: Totals
    next_chunk: int
    losses_bytes: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rest: list[dict[str, Any]] | None = None

    def write(self, path: Path) -> None:
        """To a file."""
        values = {
            "version": VERSION,
            "identity": self.identity,
            "totals": self.totals.to_json(),
            "next_chunk": self.next_chunk,
            "losses_bytes": self.losses_bytes,
            "rest": self.rest,
        }
        write_whole(path, save(self.tensors, {"evaluation": json.dumps(values)}))

    @classmethod
    def read(cls, path: Path, identity: dict[str, Any]) -> "SavedState | None":
        """From a file; None if there is none.

        Raises:
            EvaluationChanged: it is of another model, text or setting, or can't be read.
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
            f"state = {str(path)!r} was saved of something else:\n" + "\n".join(lines) + "\n"
            "  Go on with what was saved, or delete the file to begin anew."
        )


def fingerprint(model: Any) -> str:
    """Of a sample of every parameter: tells whether the weights are the same."""
    digest = hashlib.sha256()
    named = model.named_parameters() if hasattr(model, "named_parameters") else ()
    for name, parameter in named:
        parts = [part for part in plain_tensors(parameter.detach()) if not part.is_meta]
        samples = [part.flatten()[:SAMPLE].float().cpu().numpy().tobytes() for part in parts]
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + b"".join(samples))
    return digest.hexdigest()[:16]
