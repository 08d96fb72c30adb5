"""The mesh's DHT: who serves which model, found without a server. The only importer of kademlia."""

from mesh.dht.node import Dht, Holdings, PeerInfo, Pong
from mesh.dht.probe import probe
from mesh.dht.protocol import Duplicate
from mesh.dht.rpc import Role

__all__ = ["Dht", "Duplicate", "Holdings", "PeerInfo", "Pong", "Role", "probe"]
