"""The folder that an export is to go to: whether it can take it."""

import shutil
from pathlib import Path

from ray_abliterate.errors import ExportError

SPARE = 1.1
"""Free disk space wanted, as a multiple of what is written."""


def check_target(to: Path, source: Path, wanted: float) -> None:
    """Refuse a folder that cannot take `wanted` bytes.

    Raises:
        ExportError: it is occupied, inside the base model's folder `source`, it cannot be looked
            at, or the disk is too full.
    """
    try:
        _refuse_occupied(to)
        standing = next(place for place in to.parents if place.exists())
        free = shutil.disk_usage(standing).free
    except OSError as error:
        raise ExportError(
            f"{to} cannot be used ({error.strerror}); choose another folder with --to."
        ) from None
    if to.is_relative_to(source):
        raise ExportError(f"{to} lies inside the base model's folder; choose another one.")
    if free < SPARE * wanted:
        raise ExportError(
            f"the export needs {SPARE * wanted / 1e9:.2f} GB, but {standing} has "
            f"{free / 1e9:.2f} GB free.\n"
            "  Free some space, or choose a folder on another disk with --to."
        )


def _refuse_occupied(to: Path) -> None:
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ExportError(f"{to} exists and is not an empty folder; choose another one with --to.")
    if unverified_name(to).exists():
        raise ExportError(f"{unverified_name(to)} is left of an earlier export; remove it first.")


def unverified_name(to: Path) -> Path:
    """Where an export goes that did not score as the trial did."""
    return to.with_name(f"{to.name}.unverified")
