"""Measure the claim."""

from benchmarks.direction_search.claim import main, silence_warnings

if __name__ == "__main__":
    silence_warnings()
    main()
