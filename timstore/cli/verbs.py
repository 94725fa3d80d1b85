"""Verbs in modules that are imported when they run, so that none waits for what another needs."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup

from timstore.cli.failures import reported


class Verbs(TyperGroup):
    """A group of verbs, each a function `run` and `EXAMPLES` in a module of its own. Errors are reported."""

    modules: ClassVar[Mapping[str, str]]
    """Verb to module; a module with an `app` is a group of verbs itself."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order of the help."""
        return list(self.modules)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb, imported now, or None."""
        if cmd_name not in self.modules:
            return None
        module = import_module(f"timstore.cli.{self.modules[cmd_name]}")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        if hasattr(module, "app"):
            alone = module.app
        else:
            alone.command(epilog=module.EXAMPLES)(module.run)
        command: Any = typer.main.get_command(alone)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that the context names."""
        with reported():
            return super().invoke(ctx)
