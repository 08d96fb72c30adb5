"""`invite`, `join`, `leave`: which mesh this machine belongs to."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from node.cli import options
from node.cli.output import data, progress, reporting, text

HOUR = 3600


def invite(
    hours: Annotated[
        float, typer.Option(min=0.01, max=24 * 365, help="How long the token may be used.")
    ] = 168,
    qr: Annotated[bool, typer.Option("--qr/--no-qr", help="Show it as a QR code as well.")] = True,
    data_dir: options.DataDir = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print a join token for the mesh of the node that runs here: its name, its secret, its addresses."""
    with reporting(as_json=as_json):
        from mesh.join import Invitation, encode_token
        from node.cli.entry import ask_local, local_network

        status = asyncio.run(ask_local(data_dir, "status"))
        network = local_network(data_dir)
        expires = int(time.time() + hours * HOUR)
        token = encode_token(Invitation(network, tuple(status["addresses"]), expires))
        if as_json:
            data({"token": token, "network": network.name, "private": network.private, "expires": expires})
            return
        text(token)
        if qr and not quiet:
            import sys

            import segno

            segno.make(token.upper()).terminal(out=sys.stderr, compact=True)
        kind = "private mesh; whoever has the token can enter it" if network.private else "open mesh"
        progress(f"for {network.name} ({kind}), usable for {hours:g} hours", quiet=quiet)
        progress("on the other machine: qmesh-node join TOKEN && qmesh-node run", quiet=quiet)


def join(
    token: Annotated[str | None, typer.Argument(help="What `qmesh-node invite` printed.")] = None,
    new: Annotated[
        str | None, typer.Option("--new", metavar="NAME", help="Found a private mesh with a fresh secret.")
    ] = None,
    data_dir: options.DataDir = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make this machine belong to a mesh; `run` and all other commands use it from then on."""
    with reporting(as_json=as_json):
        from mesh.errors import ConfigurationError
        from mesh.join import decode_token
        from node import membership
        from node.config import default_data_dir
        from node.folder import running_node

        if (token is None) == (new is None):
            raise ConfigurationError("give either a token or --new NAME", "See `qmesh-node join --help`.")
        if new is not None:
            joined = membership.found(new)
        else:
            invitation = decode_token(str(token), time.time())
            joined = membership.Membership(invitation.network, invitation.addresses)
        folder = (data_dir or default_data_dir()).expanduser()
        membership.keep(folder, joined)
        if as_json:
            data({"network": joined.network.name, "private": joined.network.private})
            return
        kind = "private" if joined.network.private else "open"
        progress(f"this machine now belongs to {joined.network.name} ({kind})", quiet=quiet)
        if running_node(folder) is not None:
            progress("the node that runs here changes over when it is started again", quiet=quiet)


def leave(
    data_dir: options.DataDir = None, as_json: options.Json = False, quiet: options.Quiet = False
) -> None:
    """Forget the mesh that this machine belongs to, and its secret; back to the open mesh."""
    with reporting(as_json=as_json):
        from node import membership
        from node.config import default_data_dir

        left = membership.forget((data_dir or default_data_dir()).expanduser())
        if as_json:
            data({"left": left})
        else:
            progress("left; the open mesh is used from now on" if left else "no mesh was joined", quiet=quiet)
