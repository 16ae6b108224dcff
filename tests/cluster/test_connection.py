"""Clusters whose workers can't import the package are refused, and say so."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_abliterate.cluster.placement import Placement
from ray_abliterate.cluster.remote_errors import one_line_reason, unwrap
from ray_abliterate.cluster.replica_actor import ReplicaActor, load_unedited_replica
from ray_abliterate.cluster.secrets import drivers_secrets
from ray_abliterate.errors import ModelError

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from ray_abliterate.cli.app import main
main()
"""
HIDE = """
import sys
class Hide:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "ray_abliterate":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def test_a_run_on_a_cluster_that_lacks_the_package_is_refused_at_once(
    recipe_file: Path, tmp_path: Path, cluster: Any
) -> None:
    """Ray would start the pool's process again and again."""
    other = tmp_path / "other" / "ray_abliterate"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "run", "recipe.toml"], cwd=tmp_path, capture_output=True,
        text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(other.parent), "RAY_ADDRESS": cluster.address,
             "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "can't import ray_abliterate (No module named 'ray_abliterate.cluster'" in done.stderr
    assert "Install this version of it on every node" in done.stderr
    assert str(other.parent) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_that_lacks_the_package_is_not_taken_for_one_without_memory(
    tmp_path: Path, cluster: Any
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    place = Placement(0, "here", "host", 0.0, 1.0, 1)
    host = (
        ray.remote(ReplicaActor)
        .options(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}})
        .remote(
            place,
            "m",
            drivers_secrets([]),
            load_unedited_replica,
        )
    )
    called = host.call.remote("describe")
    with pytest.raises(ModelError, match="can't import ray_abliterate on its node"):
        unwrap(called)
    with pytest.raises(ray.exceptions.ActorDiedError) as died:
        ray.get(called)
    assert one_line_reason(died.value) == "its process can't import ray_abliterate"
