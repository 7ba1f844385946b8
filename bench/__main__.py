"""`python -m bench` runs every benchmark; `python -m bench NAME` one of them."""

from bench.cli import main

# Not where a process of a benchmark imports it.
if __name__ == "__main__":
    main()
