"""The mesh's DHT: who serves which model, found without a server. The only importer of kademlia."""

from mesh.dht.node import Dht, Holdings, PeerInfo, Pong
from mesh.dht.protocol import Duplicate

__all__ = ["Dht", "Duplicate", "Holdings", "PeerInfo", "Pong"]
