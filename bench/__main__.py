"""`python -m bench` runs every benchmark; `python -m bench NAME` one of them."""

from bench.cli import main

main()
