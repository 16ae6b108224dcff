"""How a search scales: throughput, the sampler's time, what a budget finds.

    python -m benchmarks.search_scaling [--replicas 16] [--seconds 5]
        [--parts throughput efficiency …]

Each part writes a file of its own: `results/scaling.json` (throughput), `scaling-sampler.json`,
`scaling-efficiency.json`. The modules `throughput`, `sampler_time` and `efficiency` say how each is
measured. The last line printed is the share of the ideal throughput with that many replicas.
"""

import argparse
import sys
from typing import Any

from benchmarks.harness.record import save, saved


def sampler(options: argparse.Namespace) -> None:
    """What asking and telling cost as a study grows."""
    from benchmarks.search_scaling import sampler_time

    print(save("scaling", sampler_time.figures(options.sizes, report), "scaling-sampler"))


def efficiency(options: argparse.Namespace) -> None:
    """What a budget finds, by how many plans are in flight."""
    from benchmarks.search_scaling import budget_efficiency as found

    figures = found.figures(options.in_flight, options.budgets, options.seeds, report)
    print(save("scaling", figures, "scaling-efficiency"))


def throughput(options: argparse.Namespace) -> None:
    """Trials per hour by the number of GPUs."""
    from benchmarks.search_scaling import throughput as measured

    asked = options.gpus or doublings(options.replicas)
    rows = measured.figures(asked, options.seconds, options.rounds, report)
    kept: list[dict[str, Any]] = []
    if options.gpus:
        kept = [row for row in saved("scaling")["gpus"] if row["gpus"] < asked[0]]
    figures = {"seconds": options.seconds, "rounds": options.rounds, "gpus": [*kept, *rows]}
    print(save("scaling", figures))
    print(f"efficiency at {rows[-1]['gpus']}: {100 * rows[-1]['efficiency']:.1f} %")


def doublings(most: int) -> list[int]:
    """1, 2, 4, … and the most."""
    below = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*below, most]


def report(line: str) -> None:
    """What is known so far."""
    print(line, file=sys.stderr, flush=True)


PARTS = {"sampler": sampler, "efficiency": efficiency, "throughput": throughput}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--replicas", type=int, default=16, help="most GPUs")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a trial")
    parser.add_argument(
        "--gpus", type=int, nargs="*", help="these numbers only; smaller ones are kept as they are"
    )
    parser.add_argument("--rounds", type=int, default=12, help="trials of each GPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--budgets", type=int, nargs="+", default=[60, 200])
    parser.add_argument("--seeds", type=int, default=12)
    options = parser.parse_args()
    for name, part in PARTS.items():
        if name in options.parts:
            part(options)


if __name__ == "__main__":
    main()
