"""Errors between this machine and the Hub: which to retry, and what to advise.

Knows nothing about what is read from it.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
"""The name of a model on the Hub, with its owner; to be matched as a whole."""
SECRETS = re.compile(r"\bhf_\w{16,}|(?<=://)[^/@\s]+@|\?\w[\w.-]*=[^\s'\"]+|(?i:bearer)\s+\S+")
"""Tokens, passwords of proxies, and queries of URLs, which may be signed."""


def retry(
    call: Callable[[], T],
    attempts: int = 5,
    first_delay: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Return `call()`, called again while it fails for a reason that may pass.

    Args:
        call: What may fail.
        attempts: How often it is called at most.
        first_delay: Seconds before the second attempt. The delay doubles each time, with up to half
            of it added at random, so that many processes don't come back together.
        sleep: Waits for so many seconds.

    Raises:
        Exception: what the last attempt raised, or the first that another attempt cannot mend.
    """
    jitter = random.Random()  # the global generator belongs to the run
    for attempt in range(1, attempts):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            delay = first_delay * 2 ** (attempt - 1) * jitter.uniform(1.0, 1.5)
            tries, why = f"attempt {attempt} of {attempts}", first_line(error)
            log.warning("%s failed (%s); the next is in %.1f s", tries, why, delay)
        sleep(delay)
    return call()


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later: no connection, timeout, 408, 429 or 5xx."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # The Hub's HTTP library changed its name (httpx, httpx2); this class kept its own.
    transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return transport or isinstance(error, ConnectionError | TimeoutError)


def dataset_advice(error: Exception, dataset: str) -> str:
    """Return the next step after an error that a Hub data set raised."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors as hub

    gated = isinstance(error, hub.GatedRepoError) or "gated dataset" in str(error)
    unknown = (hub.RepositoryNotFoundError, DatasetNotFoundError, hub.HFValidationError)
    page = f"https://huggingface.co/datasets/{dataset}"
    cases = (
        (gated, f"It is gated: accept its terms at {page}, then log in with `hf auth login`."),
        (isinstance(error, hub.RevisionNotFoundError), "Check `revision`."),
        (
            isinstance(error, unknown),
            "Check the name (owner/name; no local folder has it either). "
            "If it is private, log in with `hf auth login`.",
        ),
        (
            http_status(error) in (401, 403),
            "Log in with `hf auth login`, as a user who may read it.",
        ),
        (isinstance(error, hub.OfflineModeIsEnabled), "Unset HF_HUB_OFFLINE, or set `file`."),
        (is_transient(error), "The Hub cannot be reached; try again later, or set `file`."),
    )
    return next((advice for holds, advice in cases if holds), "Check `split` and `config`.")


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error; None if there is none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def first_line(error: BaseException) -> str:
    """Return the message's first line without secrets, or the error's type if it has none."""
    lines = SECRETS.sub("…", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
