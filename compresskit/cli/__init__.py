"""The command line: one file per command. Importing it loads typer and nothing heavy."""
