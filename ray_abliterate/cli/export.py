"""The verbs that carry models in and out: `export`, `reproduce`, `push` and `import-heretic`."""

from pathlib import Path
from typing import Annotated

import typer

from ray_abliterate.cli.options import RunFolder, RunOrExport, TrialNumber, choose_trial, open_run
from ray_abliterate.cli.terminal import console, log_to, release_terminal, say, user_stderr

commands = typer.Typer()

Originals = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub name (OWNER/NAME@REVISION) of the full-precision model, after a search "
        "on a quantized checkpoint.",
        show_default="the run's own model",
    ),
]


@commands.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    trial: TrialNumber = None,
    kind: Annotated[
        str,
        typer.Option("--as", help="merged: a whole model. adapter: a PEFT adapter for it."),
    ] = "merged",
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Largest weight file, such as 5GB.", show_default="the original's own files"
        ),
    ] = None,
    adapter_error: Annotated[
        float,
        typer.Option(help="Largest part of an edit that an adapter may lack, as a share of it."),
    ] = 0.01,
    originals: Originals = None,
    verify: Annotated[bool, typer.Option(help="Reload the export and score it again.")] = True,
) -> None:
    """Write the edited model, or an adapter for the original, and verify what was written."""
    from ray_abliterate.export.export import ExportForm, export_trial

    form = ExportForm.of(kind, shard_size, adapter_error)
    directory = open_run(run)
    log_to(directory.log)
    from ray_abliterate.cli.progress_display import LineDisplay

    chosen, progress = choose_trial(directory, trial), LineDisplay(console())
    export_trial(directory, chosen, to, progress, verify, form, originals)


@commands.command()
def reproduce(
    file: Annotated[Path, typer.Argument(help="A reproduce.json, or an export that contains one.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of the base model.", show_default="as reproduce.json has it"
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base model.")
    ] = False,
) -> None:
    """Rebuild an export from its base model, without a search, and check every tensor."""
    from ray_abliterate.cli.progress_display import LineDisplay
    from ray_abliterate.export.reproduce import rebuild_export

    rebuilt = rebuild_export(file, to, LineDisplay(console()), base, trust_remote_code)
    tensors = "edited tensors" if rebuilt.kind == "merged" else "tensors of the adapter"
    equal = f"{rebuilt.bit_equal} of {rebuilt.tensors} {tensors} are equal bit for bit"
    others = "" if rebuilt.bit_equal == rebuilt.tensors else "; the others are within rounding"
    say(f"{equal}{others}. Written to {to}")


@commands.command()
def push(
    place: RunOrExport,
    to: Annotated[str, typer.Option(help="USER/NAME of the model on the Hugging Face Hub.")],
    trial: TrialNumber = None,
    originals: Originals = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Upload even if the export was not scored again.")
    ] = False,
    with_responses: Annotated[
        bool, typer.Option("--with-responses", help="Upload files with prompts or answers, too.")
    ] = False,
) -> None:
    """Upload an export to the Hugging Face Hub; it stays private without --public."""
    from ray_abliterate.cli.progress_display import LineDisplay
    from ray_abliterate.export.find_export import find_or_export
    from ray_abliterate.export.push import upload_export

    progress = LineDisplay(console())
    folder = find_or_export(place, trial, progress, unverified, originals)
    if user_stderr().isatty():
        release_terminal()  # the Hub's client shows its progress bars itself
    revision = upload_export(folder, to, progress, public, unverified, with_responses)
    say(f"Uploaded to {to}, revision {revision}")


@commands.command()
def import_heretic(
    checkpoint: Annotated[Path, typer.Argument(help="Heretic's checkpoints/MODEL.jsonl.")],
    to: Annotated[
        Path | None, typer.Option(help="Run directory.", show_default="runs/CHECKPOINT")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of the model.", show_default="as the checkpoint has it"
        ),
    ] = None,
    front: Annotated[bool, typer.Option("--front", help="Import its Pareto front only.")] = False,
) -> None:
    """Turn a Heretic study into a run whose first trials are the study's own."""
    from ray_abliterate.cli.progress_display import LineDisplay
    from ray_abliterate.cli.tables import foreign_table
    from ray_abliterate.pipeline.heretic.import_study import import_study

    output = console()
    folder = to or Path("runs") / checkpoint.stem
    imported = import_study(checkpoint, folder, LineDisplay(output), model, front)
    output.print(foreign_table(imported.directory.imported_study() or {}, rows=20))
    for note in imported.notes:
        output.print(f"note: {note}", markup=False)
    if imported.study.unfinished:
        output.print(f"{imported.study.unfinished} unfinished trials of the study are left out")
    output.print(f"{len(imported.trials)} plans wait in {folder}. Score them, in parallel, with:")
    output.print(f"  ray-abliterate resume {folder}", markup=False)
