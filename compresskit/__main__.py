"""`python -m compresskit` is the command line."""

from compresskit.cli.app import main

main()
