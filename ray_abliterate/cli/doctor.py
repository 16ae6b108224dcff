"""Checks a machine, and whether a recipe can run on it, without Ray and without weights.

Each check says what was found, and what to do about it.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_abliterate.cli.recipe_preview import asked, read
from ray_abliterate.cluster.placement import Layout, plan_layout
from ray_abliterate.data.builtin import demo_model as demo
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ModelError, PromptSourceError, RayAbliterateError
from ray_abliterate.evaluation.scorers.build import build_scorers
from ray_abliterate.model import quantization
from ray_abliterate.model.architecture import WriterRow, find_writers
from ray_abliterate.model.chat_format import ChatFormat
from ray_abliterate.model.devices import (
    cpu_cores,
    gpu_memory,
    nearest_existing_folder,
    ram_available,
)
from ray_abliterate.model.loading import advice as advice_on_loading
from ray_abliterate.model.skeleton import build_skeleton
from ray_abliterate.model.source import model_source
from ray_abliterate.pipeline.replicas import LIBRARIES
from ray_abliterate.recipe import ModelSettings, PromptSource, Recipe
from ray_abliterate.replica.memory_estimate import USUAL_BATCH, MemoryEstimate, estimate_memory

State = Literal["ok", "warn", "FAIL"]
COLOURS: dict[State, str] = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
GB = 1e9
LITTLE_DISK = 5 * GB
TIGHT = 0.85
"""Above this share of the memory an estimate is no promise."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    fix: str = ""


def check_all(recipe: Recipe | None, base: Path, output: Console) -> int:
    """Print a table of checks.

    Args:
        recipe: Checked too, if given.
        base: The recipe's folder.
        output: Where the table goes.

    Returns:
        0 if a run can work, warnings or not; 1 if something will fail.
    """
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "check", "found"):
        table.add_column(heading, overflow="fold")
    with output.status("looking"):
        checks = [*machine_checks(), *(recipe_checks(recipe, base) if recipe else ())]
    for check in checks:
        found = Text(check.found)
        if check.fix and check.state != "ok":
            found.append(f"\n→ {check.fix}")
        table.add_row(Text(check.state, COLOURS[check.state]), check.name, found)
    states = [check.state for check in checks]
    output.print(table)
    failed, warned = states.count("FAIL"), states.count("warn")
    output.print(f"{failed} will fail, {warned} worth a look, {states.count('ok')} fine")
    return 1 if failed else 0


# This machine


def machine_checks() -> Iterator[Check]:
    """What every run needs."""
    yield libraries()
    yield devices()
    yield memory()
    yield from disks()
    yield demo_model()
    yield hub_token()
    yield run_folder()
    if address := os.environ.get("RAY_ADDRESS"):
        found = (
            f"RAY_ADDRESS = {address}: runs go to that cluster, these figures are this machine's"
        )
        yield Check("cluster", "warn", found, "Run doctor on the cluster's nodes too.")


def libraries() -> Check:
    """Versions of Python and of what matters most."""
    from packaging.requirements import Requirement

    try:
        wanted = {r.name: r for r in map(Requirement, requires("ray-abliterate") or ())}
    except PackageNotFoundError:  # A checkout that was not installed declares nothing.
        wanted = {}
    found, wrong = [f"Python {sys.version.split()[0]}"], []
    for library in LIBRARIES:
        try:
            number = version(library)
        except PackageNotFoundError:
            found.append(f"{library} missing")
            wrong.append(library)
            continue
        found.append(f"{library} {number}")
        if library in wanted and not wanted[library].specifier.contains(number, prereleases=True):
            wrong.append(str(wanted[library]))
    fix = f"pip install --upgrade {' '.join(repr(name) for name in wrong)}"
    return Check("libraries", "FAIL" if wrong else "ok", ", ".join(found), fix)


def devices() -> Check:
    """What torch can compute on."""
    cores = f"{cpu_cores()} CPU cores"
    if torch.cuda.is_available():
        cards = [
            f"{torch.cuda.get_device_name(i)} ({free / GB:.0f} of {total / GB:.0f} GB free)"
            for i, (free, total) in enumerate(gpu_memory())
        ]
        used = any(free < TIGHT * total for free, total in gpu_memory())
        fix = "Other processes hold GPU memory; see nvidia-smi."
        return Check("devices", "warn" if used else "ok", f"{', '.join(cards)}; {cores}", fix)
    if torch.backends.mps.is_available():
        return Check("devices", "ok", f"Apple GPU (MPS); {cores}")
    built = f" (built for CUDA {torch.version.cuda})" if torch.version.cuda else ""
    fix = "Small models only. If this machine has a GPU, check its driver and torch's build."
    return Check("devices", "warn", f"torch {torch.__version__}{built} sees no GPU; {cores}", fix)


def memory() -> Check:
    """Free RAM."""
    free = ram_available()
    little = free < 4 * GB
    fix = "Close other programs; a small model alone needs more."
    return Check("memory", "warn" if little else "ok", f"{free / GB:.1f} GB of RAM free", fix)


def disks() -> Iterator[Check]:
    """Free space where models and runs go."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("model cache", Path(HF_HUB_CACHE)), ("working folder", Path.cwd())):
        free = shutil.disk_usage(nearest_existing_folder(folder)).free
        state: State = "warn" if free < LITTLE_DISK else "ok"
        fix = "Free some space." + (" Or set HF_HOME." if name == "model cache" else "")
        yield Check(name, state, f"{folder}: {free / GB:.1f} GB free", fix)


def demo_model() -> Check:
    """Whether the demo's weights are here."""
    try:
        file = demo.gguf_file()
    except demo.DemoUnavailable:
        found = "not installed; the tiny planted model would stand in for it"
        return Check("demo model", "warn", found, demo.INSTALL_COMMAND)
    return Check("demo model", "ok", file.name)


def hub_token() -> Check:
    """Whether gated models could be read; the token itself is never shown."""
    from huggingface_hub import get_token

    found = "present" if get_token() else "none; only gated or private models need one"
    return Check("Hub token", "ok", found)


def run_folder() -> Check:
    """Whether a run could be written where runs go."""
    place = nearest_existing_folder(Path("runs").absolute())
    writable = os.access(place, os.W_OK)
    found = f"{place} is {'' if writable else 'not '}writable"
    return Check("run folder", "ok" if writable else "FAIL", found, "Use --to, or another folder.")


# A recipe


def recipe_checks(recipe: Recipe, base: Path) -> Iterator[Check]:
    """What one recipe needs."""
    sets: dict[str, PromptSet] = {}
    for name, source in sources_of(recipe):
        try:
            sets[name], partly = read(name, source, base)
        except PromptSourceError as error:
            yield _failure(f"prompts {name}", error)
            continue
        size = f"first {len(sets[name])} rows" if partly else f"{len(sets[name])} prompts"
        yield Check(f"prompts {name}", "ok", f"{size}, {sets[name].origin}")
    yield from overlaps(sets)
    for scorer in recipe.scorers:
        if scorer.prompts is None or scorer.name in sets:
            yield _attempt(f"scorer {scorer.name}", lambda s=scorer: _built(s, sets))  # type: ignore[misc]
    for suite in recipe.suites:
        yield _attempt(f"suite {suite.name}", lambda s=suite: asked(s, base))  # type: ignore[misc]
    try:
        layout = plan_layout(recipe.model, cpu_cores(), len(gpu_memory()))
    except ModelError as error:
        yield _failure("replicas", error)
        return
    each = f"{layout.gpus:g} GPUs" if layout.gpus else "the CPU"
    found = f"{layout.replicas}, each on {each} with {layout.threads} threads"
    yield Check("replicas", "ok", found)
    yield from model_checks(recipe, sets, layout)


def sources_of(recipe: Recipe) -> list[tuple[str, PromptSource]]:
    """All prompt sets of a recipe, by name."""
    named = [("behaviour", recipe.prompts.behaviour), ("neutral", recipe.prompts.neutral)]
    return named + [(s.name, s.prompts) for s in recipe.scorers if s.prompts is not None]


def overlaps(sets: dict[str, PromptSet]) -> Iterator[Check]:
    """Prompts that are scored although the direction comes from them."""
    extraction = ("behaviour", "neutral")
    for known in (sets[name] for name in extraction if name in sets):
        for name, scored in sets.items():
            shared = 0 if name in extraction else len(scored.overlap(known))
            if shared:
                found = f"{shared} of {len(scored)} prompts are in {known.name!r} too"
                yield Check(f"prompts {name}", "warn", found, "Score prompts the edit hasn't seen.")


def model_checks(recipe: Recipe, sets: dict[str, PromptSet], layout: Layout) -> Iterator[Check]:
    """Configuration, chat template, family and memory; each needs the one before."""
    import transformers

    settings, notes = recipe.model, list[str]()
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        source = model_source(settings.name, notes.append)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except ModelError as error:
        yield _failure("model", error)
        return
    except (OSError, ValueError, KeyError, ImportError) as error:
        yield _failure("model", ModelError(advice_on_loading(settings.name, settings, error)))
        return
    stand_in = f" ({'; '.join(notes)})" if notes else ""
    yield Check("model", "warn" if notes else "ok", f"{settings.name}{stand_in}")
    yield from quantized(settings, config)
    yield _attempt("chat template", lambda: str(ChatFormat(tokenizer, settings) and "found"))
    try:
        module = build_skeleton(config, settings.trust_remote_code)
        rows = tuple(WriterRow(**row.model_dump()) for row in settings.writers)
        writers = find_writers(module, rows, in_memory=False)
    except ModelError as error:
        yield _failure("architecture", error)
        return
    components = ", ".join(sorted({writer.component for writer in writers}))
    found = f"{config.model_type}: {len(writers)} writers ({components})"
    yield Check("architecture", "ok", found)
    yield fit(estimate_memory(module, writers, recipe, sets.values()), recipe, layout)


def quantized(settings: ModelSettings, config: Any) -> Iterator[Check]:
    """Whether quantized weights can be loaded, and what can be made of them."""
    method = quantization.quantization_method(config)
    if not (method or settings.quantization):
        return
    try:
        quantization.refuse_unloadable(settings.name, config, settings.quantization)
    except ModelError as error:
        yield _failure("weights", error)
        return
    if settings.quantization:
        found = f"quantized as they are loaded ({settings.quantization}); exports are not"
        yield Check("weights", "ok", found)
        return
    fix = "Can be searched; export then needs what it was made of, as --originals."
    yield Check("weights", "warn", f"the checkpoint is quantized ({method})", fix)


def fit(need: MemoryEstimate, recipe: Recipe, layout: Layout) -> Check:
    """Whether a replica fits into the memory that it gets."""
    on_gpu = layout.gpus > 0
    location = recipe.model.cache_location(on_gpu)
    if on_gpu:
        copies = 1.0 if location == "device" else 0.0
    else:
        copies = 1 / layout.replicas if location == "node" else 1.0
    wanted = need.weights + need.batch + copies * need.cache + (0 if on_gpu else need.host)
    free = min((free for free, _ in gpu_memory()), default=0) if on_gpu else ram_available()
    share = free * layout.gpus if on_gpu else free / layout.replicas
    dtype = str(need.dtype).removeprefix("torch.")
    found = (
        f"{need.parameters / 1e6:,.0f} M parameters in {dtype}: about {wanted / GB:.2f} GB a "
        f"replica (weights {need.weights / GB:.2f}, weight cache {need.cache / GB:.2f}, batch "
        f"{need.batch / GB:.2f}), {share / GB:.2f} GB there"
    )
    state: State = "ok" if wanted < TIGHT * share else "warn" if wanted < share else "FAIL"
    if recipe.model.max_memory and state == "FAIL":
        found += "; what is beyond model.max_memory rests in CPU memory or on disk: slow"
        state = "warn"
    return Check("fits", state, found, " ".join(_savings(need, recipe, layout, share)))


def _savings(need: MemoryEstimate, recipe: Recipe, layout: Layout, share: float) -> Iterator[str]:
    """What would make it fit, the cheapest first."""
    batch = recipe.run.batch_size or USUAL_BATCH
    if need.batch > 0.2 * need.total and batch > 1:
        yield f"Lower run.batch_size (it is {batch})."
    if not layout.gpus:
        if layout.replicas > 1:
            yield f"Fewer replicas (model.replicas, now {layout.replicas})."
        yield "Or a smaller model, or a GPU."
        return
    if recipe.model.cache_location(True) == "device" and need.weights + need.batch < TIGHT * share:
        yield 'Set model.weight_cache = "cpu".'
    if layout.gpus < 1:
        yield f"Raise model.gpus_per_replica (it is {layout.gpus:g})."
    else:
        cards = -(-int(need.total) // int(TIGHT * share / layout.gpus or 1))
        yield f"Set model.gpus_per_replica = {max(cards, int(layout.gpus) + 1)}."
    if recipe.model.quantization is None:
        yield 'Set model.quantization = "nf4".'
    if need.dtype == torch.float32:
        yield 'Set model.dtype = "bfloat16".'


def _attempt(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except RayAbliterateError as error:
        return _failure(name, error)


def _built(scorer: Any, sets: dict[str, PromptSet]) -> str:
    build_scorers([scorer], sets)
    return f"{scorer.kind}, goal {scorer.goal}"


def _failure(name: str, error: Exception) -> Check:
    """An error of ours: the first line says what was found, the others what to do."""
    kind, _, own = name.partition(" ")
    found, _, fix = str(error).removeprefix(f"{kind} {own!r}: ").partition("\n")
    return Check(name, "FAIL", found, fix.strip())
