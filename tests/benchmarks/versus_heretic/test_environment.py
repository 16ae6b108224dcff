"""The peer's environment."""

from benchmarks.versus_heretic.environment import NEEDS


def test_the_peers_environment_names_every_package_once():
    names = [need.partition("~")[0] for need in NEEDS]
    assert len(set(names)) == len(names)
