"""Uploads an export to the Hugging Face Hub: private unless told, its model card included.

Goes on where it was broken off, because files that have arrived are not sent again: neither after a
lost connection nor when the same command is given again. The token is taken from where
`huggingface_hub` finds it, and is shown nowhere.
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

from ray_abliterate.data.hub import MODEL_NAME, SECRETS, first_line, is_transient, retry, status_of
from ray_abliterate.errors import PushError
from ray_abliterate.pipeline.progress import Progress

ATTEMPTS = 4
"""Of the upload, each of which tries each request several times."""
FIRST_DELAY = 2.0
"""Seconds before the second attempt."""
CONFIGS = ("config.json", "adapter_config.json")
PRIVATE = (
    "responses/*", "*.parquet", "*.arrow", "*.jsonl", "*transcript*", "prompt*.txt",
    "recipe.toml", "recipe.resolved.json", "environment.json", "study.journal", "report.html",
)  # fmt: skip
"""Files that hold prompts, answers or paths of the machine; no export has them."""

T = TypeVar("T")


def push(
    folder: Path,
    to: str,
    progress: Progress,
    public: bool = False,
    unverified: bool = False,
    with_responses: bool = False,
) -> str:
    """Upload a folder, and say under which revision it can be had.

    Args:
        folder: An export.
        to: `USER/NAME` of the model on the Hub; made if it isn't there.
        progress: Receives what happens.
        public: Everybody may read it.
        unverified: Also an export that was not scored again after it was written.
        with_responses: Also files that hold prompts or answers.

    Returns:
        The commit that holds all files.

    Raises:
        PushError: the folder should not be uploaded as it is, or the Hub refuses it, or can't be
            reached.
    """
    refuse_name(to)
    refuse_incomplete(folder)
    refuse_unverified(folder, unverified)
    files = files_of(folder)
    if not with_responses:
        refuse_private(folder, files)
    size = sum((folder / file).stat().st_size for file in files)
    with _hub_speaks_through(progress):
        api = _api()
        try:
            _make(api, to, public, files)
            progress.note(f"{len(files)} files, {size / 1e9:.2f} GB, to {api.endpoint}/{to}")
            with progress.stage("upload"):
                found = retry(lambda: _upload(api, folder, to, files), ATTEMPTS, FIRST_DELAY)
        except KeyboardInterrupt:
            progress.note("Give the same command again to go on: what has arrived is not sent again.")
            raise
        except Exception as error:
            raise PushError(explain(error, to)) from error
    return str(found.oid)


# Before the Hub is asked


def refuse_name(to: str) -> None:
    """Make sure that a name can be one on the Hub.

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
        PushError: its configuration, weights or card are missing, or it names a base model that
            nobody else has.
    """
    if not any((folder / name).is_file() for name in CONFIGS):
        raise PushError(
            f"{folder} is neither a run nor an export: it has no config.json.\n"
            "  Write one with:  ray-abliterate export RUN --trial N --to FOLDER"
        )
    if not list(folder.glob("*.safetensors")):
        raise PushError(f"{folder} holds no safetensors files; export it anew.")
    if not (folder / "README.md").is_file():
        raise PushError(f"{folder} holds no model card (README.md); export it anew.")
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

    Raises:
        PushError: it does not, or nobody looked and that is not allowed.
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
        raise PushError(f"{file} is damaged ({error}); export it anew.") from None
    if wrong:
        raise PushError(
            f"{folder} does not score as its trial did ({', '.join(wrong)}); it is not uploaded."
        )


def files_of(folder: Path) -> list[str]:
    """What would be uploaded: all but hidden files and those of caches."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    hidden = (".", "__pycache__")
    return sorted(p.as_posix() for p in paths if not any(x.startswith(hidden) for x in p.parts))


def refuse_private(folder: Path, files: list[str]) -> None:
    """Make sure that nothing is published that is not part of a model.

    Raises:
        PushError: there are files that may hold prompts, answers or paths.
    """
    found = [
        file
        for file in files
        if any(fnmatch.fnmatch(part, p) for p in PRIVATE for part in (file, Path(file).name))
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise PushError(
            f"{folder} holds files that may show prompts, answers or paths of this machine: "
            f"{', '.join(found[:3])}{more}.\n"
            "  Move them away, or upload them too with --with-responses."
        )


# The Hub


def _api() -> Any:
    """The Hub's client, with the token that is known to it.

    Raises:
        PushError: there is no token, or the Hub is switched off.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise PushError("HF_HUB_OFFLINE is set, so the Hub is not asked; unset it.")
    if not hub.get_token():
        raise PushError(
            "no token for the Hugging Face Hub is known here.\n"
            "  Log in with:  hf auth login   (or set HF_TOKEN), with a token that may write."
        )
    return hub.HfApi()


def _make(api: Any, to: str, public: bool, files: list[str]) -> None:
    """Make the model's place on the Hub, or look at the one that is there.

    Raises:
        PushError: it is public and should not be, or holds other weights.
    """
    retry(lambda: api.create_repo(to, private=not public, exist_ok=True), ATTEMPTS, FIRST_DELAY)
    known = retry(lambda: api.repo_info(to), ATTEMPTS, FIRST_DELAY)
    if not public and not known.private:
        raise PushError(
            f"{to} is there already, and everybody can read it.\n"
            "  Choose another name, or say --public."
        )
    there = {sibling.rfilename for sibling in known.siblings or ()}
    other = sorted(name for name in there - {*files} if name.endswith(".safetensors"))
    if other:
        raise PushError(
            f"{to} holds other weights already ({other[0]}); both would be taken for one model.\n"
            "  Choose another name, or remove them there first."
        )


def _upload(api: Any, folder: Path, to: str, files: list[str]) -> Any:
    """Upload what has not arrived.

    `upload_folder` sends several files at once, and asks first which of them are there.
    """
    try:
        return api.upload_folder(
            repo_id=to,
            folder_path=folder,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in files],
            commit_message="Upload with ray-abliterate",
        )
    except RuntimeError as error:
        # of one file; the reason is beneath it
        if error.__cause__ is not None and is_transient(error.__cause__):
            raise error.__cause__ from None
        raise


def explain(error: BaseException, to: str) -> str:
    """What an error of the Hub means, and what to do."""
    reasons = list(_beneath(error))
    if isinstance(error, PushError):
        return str(error)
    status = next((s for s in map(status_of, reasons) if s is not None), None)
    told = [str(m) for r in reasons if (m := getattr(r, "server_message", None))]
    said = f" (it says: {SECRETS.sub('…', told[0]).splitlines()[0]})" if told else ""
    user = to.partition("/")[0]
    advice = {
        401: "The token is not accepted: it is wrong, was revoked, or has expired.\n"
        "  Log in anew with:  hf auth login",
        403: f"The Hub does not let this token write to {user}{said}.\n  Make one that may, on "
        "huggingface.co/settings/tokens, or choose another name.",
        404: f"There is no user or organisation {user}, or the token may not see it.\n"
        "  Check --to.",
        429: "The Hub asks for patience: too many requests for now.\n  Give the same command again "
        "in a while; what has arrived is not sent again.",
    }
    if status in advice:
        return f"{to} was not uploaded. {advice[status]}"
    if any(map(is_transient, reasons)):
        return (
            f"{to} was not uploaded whole: the Hub can't be reached ({first_line(reasons[-1])}).\n"
            "  Give the same command again; what has arrived is not sent again."
        )
    return f"{to} was not uploaded: {first_line(error)}{said}"


def _beneath(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


class _Notes(logging.Handler):
    """What the Hub's client logs, without secrets."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self._progress.note(f"  {SECRETS.sub('…', record.getMessage())}")


@contextmanager
def _hub_speaks_through(progress: Progress) -> Iterator[None]:
    """The Hub's client shows its bars in a terminal only, and its warnings through us."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    client = logging.getLogger("huggingface_hub")
    before, client.handlers = client.handlers, [_Notes(progress)]
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        client.handlers = before
        if quiet:
            enable_progress_bars()
