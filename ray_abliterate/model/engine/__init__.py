"""The fast path: packed rows, drafts, CUDA graphs."""
