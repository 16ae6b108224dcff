"""What a technique is worth."""

from benchmarks.versus_heretic import worker_pair
from benchmarks.versus_heretic.technique_costs import slowdowns


class Clock:
    """A stand-in for a worker; takes a second, and two more without `packing`."""

    def call(self, command, plans, off):
        return {"seconds": 3.0 if "packing" in off else 1.0}


def test_a_technique_is_worth_what_a_pass_takes_longer_without_it(monkeypatch):
    monkeypatch.setattr(worker_pair, "SETTLE_SECONDS", 0)
    without = {"packing": ["packing"], "reuse": ["reuse"], "all": ["packing", "reuse"]}
    costs = slowdowns(Clock(), ["plan"], without, rounds=2)
    assert {name: row["slowdown"] for name, row in costs.items()} == {
        "packing": 3.0,
        "reuse": 1.0,
        "all": 3.0,
    }
