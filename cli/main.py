"""The `edgeattn` command."""

from __future__ import annotations

import sys

import typer

from edgeattn.cli.console import ERRORS
from edgeattn.cli.lazy import lazy_group
from edgeattn.foundation import UserError

COMMANDS = {
    "list": "edgeattn.cli.listing:list_declarations",
    "inspect": "edgeattn.cli.inspect:inspect",
    "export": "edgeattn.cli.export:export",
    "split": "edgeattn.cli.split:split",
    "compare": "edgeattn.cli.compare:compare",
    "segment": "edgeattn.cli.segment:segment",
    "report": "edgeattn.cli.report:report",
    "video": "edgeattn.cli.video:video",
    "bisect": "edgeattn.cli.bisect:bisect",
    "sensitivity": "edgeattn.cli.sensitivity:sensitivity",
    "tune": "edgeattn.cli.tune:tune_precisions",
    "rewrite": "edgeattn.cli.rewrite:rewrite",
    "check": "edgeattn.cli.check:check",
    "estimate": "edgeattn.cli.estimate:estimate_model",
    "build": "edgeattn.cli.build:build",
    "bundle": "edgeattn.cli.bundle:bundle",
    "sweep": "edgeattn.cli.sweep:sweep",
    "plugins": "edgeattn.cli.plugins:app",
    "demo": "edgeattn.cli.demo:demo",
}
"""Where each command is declared, in the order of the help."""

app = typer.Typer(
    name="edgeattn",
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def edgeattn() -> None:
    """Trained attention models from PyTorch to TensorRT, with proof that nothing changed on the way."""


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
