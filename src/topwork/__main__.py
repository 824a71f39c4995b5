"""``python -m topwork``: the command line."""

from topwork.cli import main

main()
