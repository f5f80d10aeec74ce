"""The command `mergekit-pave`."""

from __future__ import annotations

from importlib import import_module

import click

_PLACES = {  # the module and the name of each command
    "cache": ("cache", "cache"),
    "calibrate": ("plan", "calibrate"),
    "doctor": ("doctor", "doctor"),
    "plan": ("plan", "plan"),
    "report": ("plan", "write_report"),
    "restore": ("restore", "restore"),
    "score": ("score", "score"),
    "tune": ("tune", "tune"),
}


class _Commands(click.Group):
    """Imports a command when it is asked for: what most of them need takes seconds, and `doctor` shall speak at once."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_PLACES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _PLACES:
            return None
        module, command = _PLACES[name]
        return getattr(import_module(f"mergekit_pave.cli.{module}"), command)


@click.group(cls=_Commands)
@click.version_option(package_name="mergekit-pave")
@click.pass_context
def main(context: click.Context) -> None:
    """Merges that keep what their models know: plan, score, tune and report what a `pave:` block does to a merge of mergekit."""
    if context.invoked_subcommand not in ("doctor", "cache"):
        from mergekit_pave.hook import host
        from mergekit_pave.progress import no_bars_of_others

        host.register()
        context.with_resource(no_bars_of_others(hidden=True, downloads=False))  # each phase has one of ours
