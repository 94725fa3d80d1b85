"""The command line: a verb parses what it is given, calls the public API, and prints. One verb, one file.

What a verb needs beyond reading and SQL, torch above all, it imports when it runs.
"""

from timstore.cli.app import app, main

__all__ = ["app", "main"]
