"""Write the pages of verbs, and the same facts as JSON beside them.

Three verbs leave a page: `directions`, `residuals`, and `evaluate` of one long text.
"""

import json
from dataclasses import asdict
from pathlib import Path

from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.directions.comparison.compare import MethodComparison
from ray_abliterate.directions.layer_selection import LayerSelection
from ray_abliterate.directions.layer_views import misplaced_prompts
from ray_abliterate.errors import RunDirectoryError
from ray_abliterate.pipeline.residual_analysis import ResidualAnalysis
from ray_abliterate.pipeline.text_evaluation import TextResults
from ray_abliterate.report.page import Page
from ray_abliterate.report.text_page import text_page


def write_residuals(found: ResidualAnalysis, page: Page, folder: Path) -> Path:
    """Write `residuals.json` and `residuals.html`; says where the page is."""
    facts = {
        "best_layer": found.best,
        "trial": found.trial,
        "strengths": found.strengths,
        "astray": misplaced_prompts(found.views[found.best]),
        "layers": [
            {
                "layer": v.layer,
                **asdict(v.geometry),
                **(v.measures if v.held_out else dict.fromkeys(v.measures)),
                "components_shares": v.components_shares,
                "gap_shares": v.gap_shares,
            }
            for v in found.views
        ],
    }
    return _write(folder, "residuals", facts, page)


def write_directions(
    found: MethodComparison, page: Page, folder: Path, selection: LayerSelection | None = None
) -> Path:
    """Write `directions.json` and `directions.html`; says where the page is."""
    tried = {"selection": selection.to_json()} if selection else {}
    return _write(folder, "directions", {**found.to_json(), **tried}, page)


def _write(folder: Path, name: str, facts: object, page: Page) -> Path:
    try:
        write_atomically(
            folder / f"{name}.json", json.dumps(facts, indent=1, allow_nan=False).encode()
        )
        write_atomically(folder / f"{name}.html", page.html().encode())
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be written ({error.strerror}).\n"
            "  Choose a folder you may write to with --to."
        ) from None
    return folder / f"{name}.html"


def write_text_page(text: TextResults, folder: Path) -> Path:
    """Write `chunks.html`, the loss of each chunk of each model, and return its path."""
    file = folder / "chunks.html"
    write_atomically(file, text_page(text).encode())
    return file
