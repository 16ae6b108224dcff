"""A model for suites, and questions for it."""

import json
from pathlib import Path

import pytest

from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.testing.tiny_language_model import tiny_language_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny_language_model(tmp_path_factory.mktemp("suites") / "model", ("stars", "river"))


def questions(*subjects: str, each: int = 4) -> list[dict]:
    """Questions of some subjects, one subject after the other."""
    return [
        {
            "question": f"what is {subject} {number}",
            "subject": subject,
            "choices": ["bread", "soup", "stars", "the river"],
            "answer": number % 4,
        }
        for subject in subjects
        for number in range(each)
    ]


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
