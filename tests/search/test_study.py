"""The study: a journal that killed drivers can't block, and a sampler that repeats no plan."""

from pathlib import Path
from typing import Any

import optuna
import pytest

from ray_abliterate.recipe import SearchSettings, SpaceSettings
from ray_abliterate.search.plan import ModelShape
from ray_abliterate.search.space import SearchSpace
from ray_abliterate.search.study import make_sampler, open_storage, open_study, optuna_distributions

SPACE = SearchSpace.of(ModelShape(8, 32, ("attn", "mlp")), SpaceSettings(), "none")


@pytest.mark.timeout(20)
def test_a_lock_that_a_killed_driver_left_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    lock = Path("run", "study.journal.lock")
    lock.symlink_to("run/study.journal")
    study = open_study(open_storage(Path("run", "study.journal")), ["minimize"] * 2)
    study.tell(study.ask(), (1.0, 1.0))
    assert len(study.trials) == 1 and not lock.is_symlink()


def test_plans_in_flight_are_all_different(tmp_path: Path) -> None:
    """Eight are asked for before any is told (constant liar)."""
    settings = SearchSettings(trials=100, startup_trials=10)
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=make_sampler(settings, 0)
    )
    spaces = optuna_distributions(SPACE)
    for _ in range(30):
        asked = study.ask(spaces)
        peak = asked.params["attn.peak"]
        study.tell(asked, [abs(1 - peak), abs(1 - peak)])
    waiting = [tuple(study.ask(spaces).params.values()) for _ in range(8)]
    assert len(set(waiting)) == 8


def test_a_resumed_sampler_draws_other_start_up_points() -> None:
    settings = SearchSettings(trials=20)

    def first_point(known: int) -> dict[str, Any]:
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=make_sampler(settings, known)
        )
        return dict(study.ask(optuna_distributions(SPACE)).params)

    assert first_point(0) == first_point(0)
    assert first_point(0) != first_point(5)
