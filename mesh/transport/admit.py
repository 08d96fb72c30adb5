"""How a newcomer gets the secret of a private mesh: both ends of the one exchange that an invitation opens.

The newcomer names the invitation, makes the handshake with its key instead of the mesh's, asks `join`, is
told the secret, and the connection ends (docs/protocol.md, "Invitations").
"""

from __future__ import annotations

import logging
import time

from mesh.address import usable_addresses
from mesh.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectFailed,
    DeadlineExceeded,
    ErrorCode,
    MalformedMessage,
    Unauthorized,
)
from mesh.identity import Identity, short_id
from mesh.join import Invitation
from mesh.limits import HANDSHAKE_TIMEOUT
from mesh.network import Network
from mesh.transport.dial import connect_any
from mesh.transport.stream import Handler, Stream

logger = logging.getLogger("mesh.wire")

METHOD = "join"
_SECRET_SIZE = 32


def admitting(network: Network, invitation_id: bytes) -> Handler:
    """What serves the streams of an invited caller: tells it the secret of the mesh, and nothing else."""

    async def admit(stream: Stream) -> None:
        if stream.method != METHOD:
            raise Unauthorized("an invitation is good for joining only")
        logger.info("admitted %s by invitation %s", short_id(stream.peer_id), invitation_id.hex())
        await stream.end({"secret": network.secret})
        await stream.connection.goaway(ErrorCode.CANCELLED, "admitted")

    return admit


async def redeem(invitation: Invitation, identity: Identity) -> Network:
    """The mesh that an invitation leads to. Nobody is asked where that is open.

    Raises ConfigurationError where the invitation is over, not accepted or not for this machine,
    ConnectFailed where the inviter does not answer, otherwise as `connect` and `Stream.read` do.
    """
    invitation.check(time.time())
    if invitation.ticket is None:
        return invitation.door
    try:
        connection = await connect_any(
            usable_addresses(invitation.addresses), identity=identity, network=invitation.door,
            peer_id=invitation.ticket.inviter, invitation_id=invitation.ticket.id,
        )  # fmt: skip
    except AuthenticationError as error:
        raise ConfigurationError(
            "the node that made the join token does not accept it",
            "It has expired by the clock of that node, or was revoked, or another node has its address now: "
            "ask for a new one (`qmesh-node invite`).",
        ) from error
    except (ConnectFailed, DeadlineExceeded) as error:
        raise ConnectFailed(
            f"the node that made the join token, and alone can admit its guests, does not answer: {error}"
        ) from error
    try:
        async with await connection.open(METHOD, {}) as stream:
            await stream.read_all(0, HANDSHAKE_TIMEOUT)
            secret = (stream.trailer or {}).get("secret")
    except Unauthorized as error:
        raise ConfigurationError(
            f"the node that made the join token refuses this machine: {error}",
            "Its owner has to let this machine in: see [peers] in the qmesh.toml there.",
        ) from error
    finally:
        await connection.close()
    if type(secret) is not bytes or len(secret) != _SECRET_SIZE:
        raise MalformedMessage("the inviter told no secret")
    return Network(invitation.name, secret)
