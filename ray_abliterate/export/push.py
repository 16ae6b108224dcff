"""Uploads an export with its model card to the Hugging Face Hub, private by default.

An upload resumes where it stopped, after a lost connection and when the same command is given
again, because files that have arrived are not sent again. The token is taken from where
`huggingface_hub` finds it, and is never shown.
"""

import fnmatch
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray_abliterate.data.hub import (
    MODEL_NAME,
    SECRETS,
    first_line,
    http_status,
    is_transient,
    retry,
)
from ray_abliterate.errors import PushError
from ray_abliterate.export.find_export import is_export
from ray_abliterate.pipeline.progress import Progress

ATTEMPTS = 4
"""Attempts at the upload, each of which tries each request several times."""
FIRST_DELAY = 2.0
"""Seconds before the second attempt."""
PRIVATE = (
    "responses/*", "*.parquet", "*.arrow", "*.jsonl", "*transcript*", "prompt*.txt",
    "recipe.toml", "recipe.resolved.json", "environment.json", "study.journal", "report.html",
)  # fmt: skip
"""Files that hold prompts, answers or paths of the machine; no export has them."""

T = TypeVar("T")


def upload_export(
    folder: Path,
    to: str,
    progress: Progress,
    public: bool = False,
    unverified: bool = False,
    with_responses: bool = False,
) -> str:
    """Upload an export.

    Args:
        folder: The export.
        to: `USER/NAME` of the model on the Hub, which is created if it isn't there.
        progress: Receives what happens.
        public: Whether everybody may read it.
        unverified: Whether to upload an export that was not scored again after it was written.
        with_responses: Whether to upload files that may hold prompts or answers.

    Returns:
        The commit that holds all files.

    Raises:
        PushError: the folder should not be uploaded as it is, or the Hub refuses it or can't be
            reached.
    """
    refuse_name(to)
    refuse_incomplete(folder)
    refuse_unverified(folder, unverified)
    files = uploaded_files(folder)
    if not with_responses:
        refuse_private(folder, files)
    size = sum((folder / file).stat().st_size for file in files)
    with _hub_speaks_through(progress):
        api = _api()
        try:
            _create_repository(api, to, public, files)
            progress.note(f"{len(files)} files, {size / 1e9:.2f} GB, to {api.endpoint}/{to}")
            with progress.stage("upload"):
                commit = retry(lambda: _upload(api, folder, to, files), ATTEMPTS, FIRST_DELAY)
        except KeyboardInterrupt:
            progress.note(
                "Give the same command again to resume: what has arrived is not sent again."
            )
            raise
        except Exception as error:
            raise PushError(explain_hub_error(error, to)) from error
    return str(commit.oid)


# Before the Hub is asked


def refuse_name(to: str) -> None:
    """Make sure that a name is one that the Hub accepts.

    Raises:
        PushError: it cannot.
    """
    bad = "--" in to or ".." in to or to.endswith((".git", ".ipynb")) or len(to) > 96
    if bad or not MODEL_NAME.fullmatch(to):
        raise PushError(
            f"--to {to!r} is not the name of a model on the Hub.\n  Write USER/NAME, in letters, "
            "digits, `.`, `_` and `-`, without `--` and `..`, in 96 characters at most."
        )


def refuse_incomplete(folder: Path) -> None:
    """Make sure that a folder is an export.

    Raises:
        PushError: its configuration, weights or card are missing, or its base model is one that
            nobody else has.
    """
    if not is_export(folder):
        raise PushError(
            f"{folder} is neither a run nor an export: it has no config.json.\n"
            "  Write one with:  ray-abliterate export RUN --trial N --to FOLDER"
        )
    if not list(folder.glob("*.safetensors")):
        raise PushError(f"{folder} holds no safetensors files; export it again.")
    if not (folder / "README.md").is_file():
        raise PushError(f"{folder} holds no model card (README.md); export it again.")
    if (folder / "adapter_config.json").is_file():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = str(config.get("base_model_name_or_path"))
        if not MODEL_NAME.fullmatch(base) or Path(base).exists():
            raise PushError(
                f"the adapter's base model is {base!r}, which nobody else has.\n"
                "  Set base_model_name_or_path in adapter_config.json to its name on the Hub."
            )


def refuse_unverified(folder: Path, allowed: bool) -> None:
    """Make sure that an export scores as its trial did.

    Args:
        folder: The export.
        allowed: Whether an export that was never verified may pass.

    Raises:
        PushError: it does not score so, or was not verified although it must be.
    """
    file = folder / "verification.json"
    if not file.is_file():
        if allowed:
            return
        raise PushError(
            f"{folder} was not verified: its files were not loaded and scored again.\n"
            "  Export it without --no-verify, or upload it as it is with --unverified."
        )
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
        wrong = [score["name"] for score in scores if not score["within"]]
    except (ValueError, KeyError, TypeError) as error:
        raise PushError(f"{file} is damaged ({error}); export it again.") from None
    if wrong:
        raise PushError(
            f"{folder} does not score as its trial did ({', '.join(wrong)}); it is not uploaded."
        )


def uploaded_files(folder: Path) -> list[str]:
    """Return the files to upload: all but hidden files and those of caches."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    hidden = (".", "__pycache__")
    return sorted(p.as_posix() for p in paths if not any(x.startswith(hidden) for x in p.parts))


def refuse_private(folder: Path, files: list[str]) -> None:
    """Make sure that nothing is published that is not part of a model.

    Raises:
        PushError: some files may hold prompts, answers or paths of this machine.
    """
    private = [
        file
        for file in files
        if any(fnmatch.fnmatch(name, p) for p in PRIVATE for name in (file, Path(file).name))
    ]
    if private:
        more = f" and {len(private) - 3} more" if len(private) > 3 else ""
        raise PushError(
            f"{folder} holds files that may show prompts, answers or paths of this machine: "
            f"{', '.join(private[:3])}{more}.\n"
            "  Move them away, or upload them too with --with-responses."
        )


# The Hub


def _api() -> Any:
    """Return the Hub's client, with the token that `huggingface_hub` finds.

    Raises:
        PushError: there is no token, or the process is set to work offline.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.")
    if not hub.get_token():
        raise PushError(
            "no token for the Hugging Face Hub was found.\n"
            "  Log in with:  hf auth login   (or set HF_TOKEN), with a token that may write."
        )
    return hub.HfApi()


def _create_repository(api: Any, to: str, public: bool, files: list[str]) -> None:
    """Create the model's repository on the Hub, or check the one that is there.

    Raises:
        PushError: it is public although it should not be, or holds other weights.
    """
    retry(lambda: api.create_repo(to, private=not public, exist_ok=True), ATTEMPTS, FIRST_DELAY)
    repository = retry(lambda: api.repo_info(to), ATTEMPTS, FIRST_DELAY)
    if not public and not repository.private:
        raise PushError(
            f"{to} exists already, and everybody can read it.\n"
            "  Choose another name, or add --public."
        )
    existing = {sibling.rfilename for sibling in repository.siblings or ()}
    other = sorted(name for name in existing - {*files} if name.endswith(".safetensors"))
    if other:
        raise PushError(
            f"{to} already holds other weights ({other[0]}); both would be taken for one model.\n"
            "  Choose another name, or delete them there first."
        )


def _upload(api: Any, folder: Path, to: str, files: list[str]) -> Any:
    """Upload what has not arrived, as one commit.

    `upload_folder` sends several files at once, and asks first which of them the Hub has.
    """
    try:
        return api.upload_folder(
            repo_id=to,
            folder_path=folder,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in files],
            commit_message="Upload with ray-abliterate",
        )
    except RuntimeError as error:
        # an error of one file; its cause says why
        if error.__cause__ is not None and is_transient(error.__cause__):
            raise error.__cause__ from None
        raise


def explain_hub_error(error: BaseException, to: str) -> str:
    """Return what an error of the Hub means, and what to do."""
    reasons = list(_causes(error))
    if isinstance(error, PushError):
        return str(error)
    status = next((s for s in map(http_status, reasons) if s is not None), None)
    messages = [str(m) for r in reasons if (m := getattr(r, "server_message", None))]
    detail = f" (it says: {SECRETS.sub('…', messages[0]).splitlines()[0]})" if messages else ""
    user = to.partition("/")[0]
    advice = {
        401: "The token is not accepted: it is wrong, was revoked, or has expired.\n"
        "  Log in again with:  hf auth login",
        403: f"The Hub does not let this token write to {user}{detail}.\n  Create one that may, on "
        "huggingface.co/settings/tokens, or choose another name.",
        404: f"There is no user or organisation {user}, or the token may not see it.\n"
        "  Check --to.",
        429: "The Hub limits requests, and there were too many requests.\n  Give the same command "
        "again in a while; what has arrived is not sent again.",
    }
    if status in advice:
        return f"{to} was not uploaded. {advice[status]}"
    if any(map(is_transient, reasons)):
        return (
            f"{to} was not uploaded completely: the Hub can't be reached "
            f"({first_line(reasons[-1])}).\n"
            "  Give the same command again; what has arrived is not sent again."
        )
    return f"{to} was not uploaded: {first_line(error)}{detail}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and each error that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


class _NotesHandler(logging.Handler):
    """Passes on what the Hub's client logs as notes, without secrets."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Note one record, with secrets blanked out."""
        self._progress.note(f"  {SECRETS.sub('…', record.getMessage())}")


@contextmanager
def _hub_speaks_through(progress: Progress) -> Iterator[None]:
    """Show the Hub's progress bars in a terminal only, and its warnings as our notes."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    client = logging.getLogger("huggingface_hub")
    before, client.handlers = client.handlers, [_NotesHandler(progress)]
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        client.handlers = before
        if quiet:
            enable_progress_bars()
