"""The mesh's DHT: who serves which model, found without a server. The only importer of kademlia."""

from mesh.dht.node import Dht, Holdings, PeerInfo, Pong

__all__ = ["Dht", "Holdings", "PeerInfo", "Pong"]
