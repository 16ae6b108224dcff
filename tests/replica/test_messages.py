"""What can be asked of a replica: the protocols, and the classes that implement them."""

import ast
import inspect
import subprocess
import sys
from types import ModuleType

import pytest

from ray_abliterate.replica import messages, replica, unedited_replica
from ray_abliterate.replica.messages import ReplicaApi, UneditedReplicaApi
from ray_abliterate.replica.replica import Replica
from ray_abliterate.replica.unedited_replica import UneditedReplica


def signatures(module: ModuleType, name: str) -> dict[str, str]:
    """Public methods of a class, their parameters and results, as its source has them."""
    tree = ast.parse(inspect.getsource(module))
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return {
        method.name: f"{ast.unparse(method.args)} -> {ast.unparse(method.returns)}"
        for method in found.body
        if isinstance(method, ast.FunctionDef) and method.returns is not None
        and not method.name.startswith("_")
    }  # fmt: skip


def test_a_replica_has_every_method_of_its_protocol_with_the_same_signature() -> None:
    unedited = signatures(messages, "UneditedReplicaApi")
    whole = unedited | signatures(messages, "ReplicaApi")
    assert whole.items() <= signatures(replica, "Replica").items()
    assert signatures(unedited_replica, "UneditedReplica") == unedited


@pytest.mark.parametrize(
    ("protocol", "implementation"),
    [(ReplicaApi, Replica), (UneditedReplicaApi, UneditedReplica)],
)
def test_every_method_that_can_be_called_says_what_it_does(
    protocol: type, implementation: type
) -> None:
    for name, method in inspect.getmembers(protocol, inspect.isfunction):
        if not name.startswith("_"):
            assert method.__doc__ and getattr(implementation, name).__doc__, name
            assert method.__name__ == name, "the name is what travels"


def test_a_driver_names_methods_and_holds_values_without_torch() -> None:
    modules = "cluster.pool", "cluster.pool_actor", "cluster.tune_trial", "replica.messages"
    imports = "; ".join(f"import ray_abliterate.{module}" for module in modules)
    program = f"import sys; {imports}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr
