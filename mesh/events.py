"""What a connection tells its owner. Pure.

Events are the peer's messages that the application must hear of, in the order of their arrival, and
`Ponged` and `Failed`. A `Reset` means that the stream is over, whichever side caused it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import ErrorCode, ProtocolError, RemoteError, ShuttingDown, TransportError, remote_error
from mesh.frames import Data, End, GoAway, Head, Meta, Open, Reset


@dataclass(slots=True)
class Ponged:
    """The answer to a PING of ours: the round trip in seconds and the peer's load."""

    token: int
    rtt: float
    load: Meta


@dataclass(slots=True)
class Failed:
    """The connection is over: the peer broke the protocol, or is silent."""

    error: ProtocolError | TransportError


Event = Open | Head | Data | End | Reset | GoAway | Ponged | Failed


def goaway_error(goaway: GoAway) -> RemoteError:
    """Why a stream was not started by a peer that goes away: its code, or shutting_down if it merely left.

    A broken protocol (bad_request) is the connection's fault, not the stream's: tampered bytes, say. The
    request may well be tried elsewhere.
    """
    if goaway.code == ErrorCode.BAD_REQUEST:
        return ShuttingDown(f"the peer gave the connection up: {goaway.message}")
    code = ErrorCode.SHUTTING_DOWN if goaway.code == ErrorCode.CANCELLED else goaway.code
    return remote_error(code, goaway.message)
