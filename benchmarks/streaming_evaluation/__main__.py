"""Measure the claim."""

from benchmarks.streaming_evaluation.claim import main

if __name__ == "__main__":
    main()
