"""`python -m ray_abliterate`: the command line."""

from ray_abliterate.cli.app import main

main()
