"""The verbs that take a model home: `export`, `reproduce`, `push`, `import-heretic`."""

from pathlib import Path
from typing import Annotated

import typer

from ray_abliterate.cli.options import RunFolder, TrialNumber, chosen_trial

Originals = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub name (OWNER/NAME@REVISION) of the full-precision model, after a search "
        "on a quantized checkpoint.",
        show_default="the run's own model",
    ),
]


def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    trial: TrialNumber = None,
    kind: Annotated[
        str, typer.Option("--as", help="merged: the whole model. adapter: a PEFT adapter.")
    ] = "merged",
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Size of the weight files, as 5GB.", show_default="the original's own files"
        ),
    ] = None,
    adapter_error: Annotated[
        float, typer.Option(help="What an adapter may lack of an edit, relative to the edit.")
    ] = 0.01,
    originals: Originals = None,
    verify: Annotated[bool, typer.Option(help="Reload, and score it again.")] = True,
) -> None:
    """Write the edited model, or an adapter for the original, and verify what was written."""
    from ray_abliterate.cli.progress_display import LineWatch, console
    from ray_abliterate.export.export import ExportForm, export_trial
    from ray_abliterate.pipeline.directory import RunDirectory

    form = ExportForm.of(kind, shard_size, adapter_error)
    directory = RunDirectory.open(run)
    chosen, watch = chosen_trial(directory, trial), LineWatch(console())
    export_trial(directory, chosen, to, watch, verify, form, originals)


def reproduce(
    file: Annotated[Path, typer.Argument(help="reproduce.json, or an export that has it.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub name of the base model; the file's if unset.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base model.")
    ] = False,
) -> None:
    """Rebuild an export from its base model, without a search, and check every tensor."""
    from ray_abliterate.cli.progress_display import LineWatch, console
    from ray_abliterate.export.reproduce import reproduce as rebuild

    found = rebuild(file, to, LineWatch(console()), base, trust_remote_code)
    what = "edited tensors" if found.kind == "merged" else "tensors of the adapter"
    equal = f"{found.bit_equal} of {found.tensors} {what} are equal bit for bit"
    rest = "" if found.bit_equal == found.tensors else "; the others, within rounding"
    typer.echo(f"{equal}{rest}. Written to {to}")


def push(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or an exported folder.")],
    to: Annotated[str, typer.Option(help="USER/NAME of the model on the Hugging Face Hub.")],
    trial: TrialNumber = None,
    originals: Originals = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Also if it was not scored again.")
    ] = False,
    with_responses: Annotated[
        bool, typer.Option("--with-responses", help="Also files with prompts or answers.")
    ] = False,
) -> None:
    """Upload an export to the Hugging Face Hub, private unless told."""
    from ray_abliterate.cli.progress_display import LineWatch, console
    from ray_abliterate.export.find_export import exported
    from ray_abliterate.export.push import push as upload

    watch = LineWatch(console())
    folder = exported(place, trial, watch, unverified, originals)
    revision = upload(folder, to, watch, public, unverified, with_responses)
    typer.echo(f"{to} is there, revision {revision}")


def import_heretic(
    checkpoint: Annotated[Path, typer.Argument(help="Heretic's checkpoints/MODEL.jsonl.")],
    to: Annotated[
        Path | None, typer.Option(help="Run directory.", show_default="runs/CHECKPOINT")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is, if not where the checkpoint says.")
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="Take over its Pareto front only.")
    ] = False,
) -> None:
    """Make a run of a Heretic study: its trials are plans that are evaluated first."""
    from ray_abliterate.cli.progress_display import LineWatch, console, foreign_table
    from ray_abliterate.pipeline.import_heretic import import_heretic as take_over

    output = console()
    folder = to or Path("runs") / checkpoint.stem
    made = take_over(checkpoint, folder, LineWatch(output), model, front)
    output.print(foreign_table(made.directory.foreign() or {}, rows=20))
    for note in made.notes:
        output.print(f"note: {note}", markup=False)
    if made.study.unfinished:
        output.print(f"{made.study.unfinished} trials of the study did not finish; left out")
    output.print(f"{len(made.trials)} plans wait in {folder}. Score them here, in parallel, with:")
    output.print(f"  ray-abliterate resume {folder}", markup=False)
