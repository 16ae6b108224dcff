"""Check a machine, and whether a recipe can run on it, without Ray and without weights."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ray_abliterate.cli.check import Check, State, attempt, failed_check
from ray_abliterate.cli.machine_checks import GB, TIGHT, check_machine
from ray_abliterate.cli.recipe_preview import preview_prompts, preview_suite
from ray_abliterate.cluster.placement import ReplicaLayout, plan_layout
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ModelError, PromptSourceError
from ray_abliterate.evaluation.scorers.build import build_scorers
from ray_abliterate.model import quantization
from ray_abliterate.model.architecture import WriterRow, find_writers
from ray_abliterate.model.chat_format import ChatFormat
from ray_abliterate.model.devices import cpu_cores, gpu_memory, ram_available
from ray_abliterate.model.loading import loading_advice
from ray_abliterate.model.skeleton import build_skeleton
from ray_abliterate.model.source import resolve_model
from ray_abliterate.recipe import ModelSettings, PromptSource, Recipe, ScorerSettings
from ray_abliterate.replica.memory_estimate import USUAL_BATCH, MemoryEstimate, estimate_memory

COLOURS: dict[State, str] = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def check_all(recipe: Recipe | None, base: Path, output: Console) -> int:
    """Print a table of checks.

    Args:
        recipe: Checked too, if given.
        base: The recipe's folder.
        output: Where the table goes.

    Returns:
        0 if a run can work, with warnings or without; 1 if something will fail.
    """
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "check", "found"):
        table.add_column(heading, overflow="fold")
    # Not `Console.status`: that would lead what libraries print back to the terminal.
    spinner = Live(
        Spinner("dots", "checking"),
        console=output,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with spinner:
        checks = [*check_machine(), *(check_recipe(recipe, base) if recipe else ())]
    for check in checks:
        finding = Text(check.finding)
        if check.fix and check.state != "ok":
            finding.append(f"\n→ {check.fix}")
        table.add_row(Text(check.state, COLOURS[check.state]), check.name, finding)
    states = [check.state for check in checks]
    output.print(table)
    failed, warned = states.count("FAIL"), states.count("warn")
    output.print(f"{failed} will fail, {warned} worth a look, {states.count('ok')} fine")
    return 1 if failed else 0


def check_recipe(recipe: Recipe, base: Path) -> Iterator[Check]:
    """Yield the checks of one recipe: prompts, scorers, suites, replicas and model."""
    sets: dict[str, PromptSet] = {}
    for name, source in sources_of(recipe):
        try:
            sets[name], is_part = preview_prompts(name, source, base)
        except PromptSourceError as error:
            yield failed_check(f"prompts {name}", error)
            continue
        size = f"first {len(sets[name])} rows" if is_part else f"{len(sets[name])} prompts"
        yield Check(f"prompts {name}", "ok", f"{size}, {sets[name].origin}")
    yield from check_overlaps(sets)
    for scorer in recipe.scorers:
        if scorer.prompts is None or scorer.name in sets:
            yield attempt(f"scorer {scorer.name}", partial(_build_scorer, scorer, sets))
    for suite in recipe.suites:
        yield attempt(f"suite {suite.name}", partial(preview_suite, suite, base))
    try:
        layout = plan_layout(recipe.model, cpu_cores(), len(gpu_memory()))
    except ModelError as error:
        yield failed_check("replicas", error)
        return
    each = f"{layout.gpus:g} GPUs" if layout.gpus else "the CPU"
    finding = f"{layout.replicas}, each on {each} with {layout.threads} threads"
    yield Check("replicas", "ok", finding)
    yield from check_model(recipe, sets, layout)


def sources_of(recipe: Recipe) -> list[tuple[str, PromptSource]]:
    """Return all prompt sets of a recipe with their names."""
    named = [("behaviour", recipe.prompts.behaviour), ("neutral", recipe.prompts.neutral)]
    return named + [(s.name, s.prompts) for s in recipe.scorers if s.prompts is not None]


def check_overlaps(sets: dict[str, PromptSet]) -> Iterator[Check]:
    """Yield a warning for each set that is scored although the direction comes from its prompts."""
    extraction = ("behaviour", "neutral")
    for known in (sets[name] for name in extraction if name in sets):
        for name, scored in sets.items():
            shared = 0 if name in extraction else len(scored.overlap(known))
            if shared:
                finding = f"{shared} of {len(scored)} prompts are in {known.name!r} too"
                yield Check(
                    f"prompts {name}",
                    "warn",
                    finding,
                    "Score prompts that the direction is not computed from.",
                )


def check_model(
    recipe: Recipe, sets: dict[str, PromptSet], layout: ReplicaLayout
) -> Iterator[Check]:
    """Yield checks of the model, each of which needs the one before: configuration, weights, chat
    template, architecture, memory.
    """
    import transformers

    settings, notes = recipe.model, list[str]()
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        source = resolve_model(settings.name, notes.append)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except ModelError as error:
        yield failed_check("model", error)
        return
    except (OSError, ValueError, KeyError, ImportError) as error:
        yield failed_check("model", ModelError(loading_advice(settings.name, settings, error)))
        return
    stand_in = f" ({'; '.join(notes)})" if notes else ""
    yield Check("model", "warn" if notes else "ok", f"{settings.name}{stand_in}")
    yield from check_quantization(settings, config)
    yield attempt("chat template", lambda: str(ChatFormat(tokenizer, settings) and "found"))
    try:
        module = build_skeleton(config, settings.trust_remote_code)
        rows = tuple(WriterRow(**row.model_dump()) for row in settings.writers)
        writers = find_writers(module, rows, in_memory=False)
    except ModelError as error:
        yield failed_check("architecture", error)
        return
    components = ", ".join(sorted({writer.component for writer in writers}))
    finding = f"{config.model_type}: {len(writers)} writers ({components})"
    yield Check("architecture", "ok", finding)
    yield check_fit(estimate_memory(module, writers, recipe, sets.values()), recipe, layout)


def check_quantization(settings: ModelSettings, config: Any) -> Iterator[Check]:
    """Yield whether quantized weights can be loaded, and what an export of them needs."""
    method = quantization.quantization_method(config)
    if not (method or settings.quantization):
        return
    try:
        quantization.refuse_unloadable(settings.name, config, settings.quantization)
    except ModelError as error:
        yield failed_check("weights", error)
        return
    if settings.quantization:
        finding = (
            f"quantized while loading ({settings.quantization}); exports are in full precision"
        )
        yield Check("weights", "ok", finding)
        return
    fix = "It can be searched; export then needs the full-precision model, as --originals."
    yield Check("weights", "warn", f"the checkpoint is quantized ({method})", fix)


def check_fit(need: MemoryEstimate, recipe: Recipe, layout: ReplicaLayout) -> Check:
    """Return whether a replica fits into the memory that it gets."""
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
    finding = (
        f"{need.parameters / 1e6:,.0f} M parameters in {dtype}: about {wanted / GB:.2f} GB a "
        f"replica (weights {need.weights / GB:.2f}, weight cache {need.cache / GB:.2f}, batch "
        f"{need.batch / GB:.2f}), {share / GB:.2f} GB available"
    )
    state: State = "ok" if wanted < TIGHT * share else "warn" if wanted < share else "FAIL"
    if recipe.model.max_memory and state == "FAIL":
        finding += "; what exceeds model.max_memory stays in CPU memory or on disk, which is slow"
        state = "warn"
    return Check("fits", state, finding, " ".join(_savings(need, recipe, layout, share)))


def _savings(
    need: MemoryEstimate, recipe: Recipe, layout: ReplicaLayout, share: float
) -> Iterator[str]:
    """Yield what would make a replica fit, the cheapest first."""
    batch = recipe.run.batch_size or USUAL_BATCH
    if need.batch > 0.2 * need.total and batch > 1:
        yield f"Lower run.batch_size (it is {batch})."
    if not layout.gpus:
        if layout.replicas > 1:
            yield f"Lower model.replicas (it is {layout.replicas})."
        yield "Choose a smaller model, or a machine with a GPU."
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


def _build_scorer(scorer: ScorerSettings, sets: dict[str, PromptSet]) -> str:
    build_scorers([scorer], sets)
    return f"{scorer.kind}, goal {scorer.goal}"
