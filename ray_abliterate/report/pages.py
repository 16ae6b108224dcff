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


def write_residuals(analysis: ResidualAnalysis, page: Page, folder: Path) -> Path:
    """Write `residuals.json` and `residuals.html`, and return the path of the page.

    Raises:
        RunDirectoryError: the folder cannot be written.
    """
    facts = {
        "best_layer": analysis.best,
        "trial": analysis.trial,
        "strengths": analysis.strengths,
        "astray": misplaced_prompts(analysis.views[analysis.best]),
        "layers": [
            {
                "layer": layer.layer,
                **asdict(layer.geometry),
                **(layer.measures if layer.held_out else dict.fromkeys(layer.measures)),
                "components_shares": layer.components_shares,
                "gap_shares": layer.gap_shares,
            }
            for layer in analysis.views
        ],
    }
    return _write(folder, "residuals", facts, page)


def write_directions(
    comparison: MethodComparison, page: Page, folder: Path, selection: LayerSelection | None = None
) -> Path:
    """Write `directions.json` and `directions.html`, and return the path of the page.

    Raises:
        RunDirectoryError: the folder cannot be written.
    """
    effects = {"selection": selection.to_json()} if selection else {}
    return _write(folder, "directions", {**comparison.to_json(), **effects}, page)


def _write(folder: Path, name: str, facts: object, page: Page) -> Path:
    try:
        text = json.dumps(facts, indent=1, allow_nan=False)
        write_atomically(folder / f"{name}.json", text.encode())
        write_atomically(folder / f"{name}.html", page.html().encode())
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be written ({error.strerror}).\n"
            "  Choose a folder you may write to with --to."
        ) from None
    return folder / f"{name}.html"


def write_text_page(text: TextResults, folder: Path) -> Path:
    """Write `chunks.html`, the loss of each chunk for each model, and return its path."""
    file = folder / "chunks.html"
    write_atomically(file, text_page(text).encode())
    return file
