"""`invite`, `join`, `leave`: which mesh this machine belongs to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

import typer

from node.cli import options
from node.cli.output import data, progress, reporting, table, text

HOUR = 3600
MAX_HOURS = 24 * 30


def invite(
    hours: Annotated[
        float, typer.Option(min=0.01, max=MAX_HOURS, help="How long the token may be used.")
    ] = 24,
    list_all: Annotated[
        bool, typer.Option("--list", help="Show the invitations of this node that are still good.")
    ] = False,
    revoke: Annotated[
        str | None,
        typer.Option(metavar="ID|TOKEN", help="Make an invitation of this node useless, at once."),
    ] = None,
    qr: Annotated[bool, typer.Option("--qr/--no-qr", help="Show it as a QR code as well.")] = True,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print a join token for the mesh of the node that runs here; in a private mesh that node admits the
    newcomers, as long as the invitation lasts."""
    with reporting(as_json=as_json):
        from mesh.errors import ConfigurationError
        from mesh.identity import parse_node_id
        from mesh.join import encode_token, issue
        from node.cli.entry import ask_local, folder_of, local_network, local_node
        from node.invitations import Invitations

        folder = folder_of(data_dir, config)
        invitations = Invitations(folder)
        if list_all and revoke is not None:
            raise ConfigurationError("--list and --revoke are two things", "Leave one of them out.")
        if list_all:
            _show_invitations(invitations.current(), as_json=as_json)
            return
        if revoke is not None:
            name = _invitation_of(revoke)
            invitations.revoke(name)
            if as_json:
                data({"revoked": name})
            else:
                progress(f"invitation {name} is revoked; who joined with it stays in", quiet=quiet)
            return
        network = local_network(local_node(folder))
        status = asyncio.run(ask_local(folder, "status"))
        expires = int(time.time() + hours * HOUR)
        invitation_id = invitations.add(expires) if network.private else b""
        inviter = parse_node_id(status["worker_id"])
        token = encode_token(issue(network, inviter, tuple(status["addresses"]), expires, invitation_id))
        if as_json:
            known = {"network": network.name, "private": network.private, "expires": expires}
            data({"token": token, **known, "id": invitation_id.hex() or None})
            return
        text(token)
        if quiet:
            return
        if qr:
            _show_code(token)
        progress(f"for {network.name} ({'private' if network.private else 'open'}), good for {hours:g} hours")
        if network.private:
            progress("whoever has it can enter, as long as this node runs; if it gets into the wrong hands:")
            progress(f"  qmesh-node invite --revoke {invitation_id.hex()}")
        progress("on the other machine: qmesh-node join TOKEN && qmesh-node run")


def _show_code(token: str) -> None:
    import sys

    import segno

    segno.make(token.upper()).terminal(out=sys.stderr, compact=True)


def _invitation_of(text: str) -> str:
    """The id in hex of an invitation that is given by that or by its token. Raises ConfigurationError."""
    from mesh.join import decode_token, looks_like_token

    ticket = decode_token(text).ticket if looks_like_token(text) else None
    return text if ticket is None else ticket.id.hex()


def _show_invitations(current: Mapping[str, int], *, as_json: bool) -> None:
    if as_json:
        for name, expires in current.items():
            data({"id": name, "expires": expires})
        return
    rows = [
        [name, datetime.fromtimestamp(expires).astimezone().isoformat(sep=" ", timespec="minutes")]
        for name, expires in current.items()
    ]
    table(["ID", "EXPIRES"], rows)
    if not rows:
        progress("no invitation is good; make one with `qmesh-node invite`")


def join(
    token: Annotated[str | None, typer.Argument(help="What `qmesh-node invite` printed.")] = None,
    new: Annotated[
        str | None, typer.Option("--new", metavar="NAME", help="Found a private mesh with a fresh secret.")
    ] = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make this machine belong to a mesh; `run` and all other commands use it from then on."""
    with reporting(as_json=as_json):
        from mesh.errors import ConfigurationError
        from mesh.join import decode_token
        from node import membership
        from node.cli.entry import folder_of
        from node.folder import running_node

        if (token is None) == (new is None):
            raise ConfigurationError("give either a token or --new NAME", "See `qmesh-node join --help`.")
        folder = folder_of(data_dir, config)
        if new is not None:
            joined = membership.found(new)
        else:
            joined = asyncio.run(membership.enter(folder, decode_token(str(token))))
        membership.keep(folder, joined)
        if as_json:
            data({"network": joined.network.name, "private": joined.network.private})
            return
        kind = "private" if joined.network.private else "open"
        progress(f"this machine now belongs to {joined.network.name} ({kind})", quiet=quiet)
        if running_node(folder) is not None:
            progress("the node that runs here changes over when it is started again", quiet=quiet)


def leave(
    data_dir: options.DataDir = None,
    config: options.Config = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Forget the mesh that this machine belongs to, and its secret; back to the open mesh."""
    with reporting(as_json=as_json):
        from node import membership
        from node.cli.entry import folder_of

        left = membership.forget(folder_of(data_dir, config))
        if as_json:
            data({"left": left})
        else:
            progress("left; the open mesh is used from now on" if left else "no mesh was joined", quiet=quiet)
