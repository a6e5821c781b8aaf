"""What all commands share: the application, and how errors end it."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ray_accel_ckpt.errors import AccelCkptError, StorageError
from ray_accel_ckpt.version import __version__

_TROUBLE = {"diff": 2, "verify": 2}
"""Exit status of an error, where 1 is an answer. It is 1 elsewhere."""
_INTERRUPTED = 130


class _Group(TyperGroup):
    """Errors are for whoever typed the command: a text and an exit status, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(_INTERRUPTED) from error
        except (AccelCkptError, OSError) as error:
            # Whoever reads the output has gone away, which typer takes care of.
            gone = isinstance(error, OSError) and error.errno == errno.EPIPE
            if ctx.params["debug"] or gone:
                raise
            known = error if isinstance(error, AccelCkptError) else _known(error)
            typer.echo(f"Error: {known}", err=True)
            raise typer.Exit(_TROUBLE.get(ctx.invoked_subcommand, 1)) from error


def _known(error: OSError) -> StorageError:
    return StorageError(
        error.strerror or str(error),
        where=str(error.filename or ""),
        why=type(error).__name__,
        remedy="see whether the path and the credentials are right; "
        "ray-accel-ckpt --debug shows where it arose",
    )


app = typer.Typer(
    cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error arose.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Exact checkpoint and resume for Ray Train loops on machines that vanish."""
