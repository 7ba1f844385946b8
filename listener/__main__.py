"""`python -m listener` is the console script `listener`."""

from listener.cli import main

main()
