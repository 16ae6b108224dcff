"""What ships: the demo's model and prompts, tables of suites."""
