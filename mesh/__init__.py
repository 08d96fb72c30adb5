"""The peer-to-peer layer: identities, the encrypted wire, signed records and the DHT.

Knows nothing of llama.cpp, of the node or of the client SDK. Modules that hold rules (identity,
records, noise, frames, streams, connection) are pure: bytes, events and the time come in, bytes and
events go out. `transport` and `dht` are the asyncio shells around them.
"""
