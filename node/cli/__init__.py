"""The command line. Heavy modules are imported by the commands that use them, never at start-up."""

from node.cli.app import main

__all__ = ["main"]
