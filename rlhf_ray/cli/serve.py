"""Commands around the service beside `serve` itself: api-key."""

from __future__ import annotations

from typing import Annotated

import typer


def api_key(
    file: Annotated[str, typer.Argument(metavar="FILE", help="file of hashed keys; created if missing")],
    name: Annotated[str, typer.Option(help="owner of the key; shown in the access log")],
    model: Annotated[list[str] | None, typer.Option(help="the key may use this model only; may be repeated")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="replies of this key at a time")] = None,
    max_tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="tokens of prompts and replies of this key in a minute")
    ] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="take the key back instead")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Make a key for the service. It is printed once; the file holds its hash."""
    from rlhf_ray.serve.api_keys import add_key, revoke_key

    if revoke:
        revoke_key(file, name)
    else:
        print(add_key(file, name, tuple(model or ()), max_concurrent, max_tokens_per_minute))


def add_serve_commands(app: typer.Typer) -> None:
    app.command("api-key")(api_key)
