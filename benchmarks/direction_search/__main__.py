"""Measure the claim."""

from benchmarks.direction_search.claim import main

if __name__ == "__main__":
    main()
