"""Measure the claim."""

from benchmarks.fault_recovery.claim import main

if __name__ == "__main__":
    main()
