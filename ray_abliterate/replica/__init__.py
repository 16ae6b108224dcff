"""One model in one process, and everything it can be asked. No Ray."""
