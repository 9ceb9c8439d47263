"""The front door: one Typer app made of the three packages' commands.

Nothing heavy is imported here: each command imports what it needs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import inspect
import json
import os
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import cluster.cli
import serving.cli
import tuning.cli
import tuning.cluster_cli
import tuning.publish_cli
from cluster.errors import LoraloomError
from cluster.signals import handle_sigterm

INTERRUPTED = 130

_SPECS = {
    "sweep": ("tuning.spec", "SweepSpec"),
    "serve": ("serving.spec", "ServeSpec"),
    "cluster": ("cluster.spec", "ClusterSpec"),
    "comparison": ("tuning.compare.document", "Comparison"),
}


class FrontDoor(TyperGroup):
    """Turns the errors that a user can act on into one line on standard error and an exit code.

    Any other exception is a bug of ours, and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with the error's code, or 130 after Ctrl-C or SIGTERM.
        """
        try:
            return super().invoke(ctx)
        except LoraloomError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=FrontDoor,
    help="Searches LoRA adapters for one frozen 4-bit base over a Ray cluster, and serves the base with all of them.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 not found, 4 conflict, 5 lacking machine, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tuning.cli.register(app)
serving.cli.register(app)
cluster.cli.register(app)
tuning.publish_cli.register_under_adapters(app)
tuning.cluster_cli.register_under_cluster(app)


def _hide_raises(within: typer.Typer) -> None:
    """Leave out of ``--help`` what a docstring tells those who read the code; the exit codes say it to users."""
    for command in within.registered_commands:
        if command.callback is not None:
            command.help = (inspect.getdoc(command.callback) or "").partition("\n\nRaises:")[0]
    for group in within.registered_groups:
        if group.typer_instance is not None:
            _hide_raises(group.typer_instance)


@app.command()
def schema(
    of: Annotated[
        Literal["sweep", "serve", "cluster", "comparison"],
        typer.Argument(help="Which kind of configuration file; or comparison: what the dashboard's data.json holds."),
    ],
) -> None:
    """Print the JSON Schema of a configuration file, for editors and checkers, or of the comparison's data."""
    module, name = _SPECS[of]
    spec = getattr(import_module(module), name)
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **spec.model_json_schema()}
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loraloom {version('loraloom')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


_hide_raises(app)


def main() -> None:
    """The console script."""
    # Ray would send the whole current folder to every worker of a program that `uv run` starts; its workers are of this
    # environment already. Ray reads the variable while it is imported.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    handle_sigterm()
    app()


if __name__ == "__main__":
    main()
