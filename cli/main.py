"""The `edgeattn` command."""

from __future__ import annotations

import sys

import typer

from edgeattn.cli import bisect, build, bundle, check, compare, demo, export, inspect, listing, plugins, rewrite
from edgeattn.cli.console import ERRORS
from edgeattn.foundation import UserError

app = typer.Typer(
    name="edgeattn",
    help="Trained attention models from PyTorch to TensorRT, with proof that nothing changed on the way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(listing.list_declarations)
app.command("inspect")(inspect.inspect)
app.command("export")(export.export)
app.command("compare")(compare.compare)
app.command("bisect")(bisect.bisect)
app.command("rewrite")(rewrite.rewrite)
app.command("check")(check.check)
app.command("build")(build.build)
app.command("bundle")(bundle.bundle)
app.add_typer(plugins.app, name="plugins")
app.command("demo")(demo.demo)


def main() -> None:
    """Run the command; bad input ends in one paragraph on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a vanished file: nothing to do with the code
        _fail(f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}.")


def _fail(message: str) -> None:
    ERRORS.print("[bold red]error:[/]", end=" ")
    ERRORS.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
