"""Ask a QMesh node for text with nothing but a socket, PyNaCl and msgpack: docs/protocol.md in code.

    python examples/raw_client.py 127.0.0.1:9470 "Once upon a time" [--model M] [--network N --secret HEX]

Uses nothing of the `mesh` package, so it can be read as a guide for writing a client in another language.
"""

import argparse
import hashlib
import hmac
import io
import json
import socket
import struct
import sys
import time
from typing import Any

import msgpack
from nacl import bindings as sodium
from nacl.exceptions import CryptoError

seal = sodium.crypto_aead_chacha20poly1305_ietf_encrypt
unseal = sodium.crypto_aead_chacha20poly1305_ietf_decrypt
nonce = struct.Struct("<4xQ").pack


def hkdf(chain: bytes, material: bytes, outputs: int) -> list[bytes]:
    key, made = hmac.digest(chain, material, hashlib.blake2b), [b""]
    for number in range(1, outputs + 1):
        made.append(hmac.digest(key, made[-1] + bytes([number]), hashlib.blake2b))
    return made[1:]


def derived(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(secret, digest_size=32, person=purpose).digest()


class Session:
    """A connection; the sections of docs/protocol.md are named at the methods."""

    def __init__(self, address: str, network: str, secret: bytes | None) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host.strip("[]"), int(port)), timeout=60)
        self.input, self.sent, self.received = self.socket.makefile("rb"), 0, 0
        self.prologue = b"qmesh/1\0" + network.encode()
        self.send_message(b"")  # "Asking for the node id"
        self.node_id = self.receive_message()
        if secret:
            self.node_id = sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(
                self.node_id[24:], self.prologue, self.node_id[:24], derived(secret, b"qmesh-whois")
            )
        self.handshake(derived(secret, b"qmesh-psk") if secret else None)

    def send_message(self, message: bytes) -> None:
        self.socket.sendall(len(message).to_bytes(2, "big") + message)

    def receive_message(self) -> bytes:
        size = self.input.read(2)
        if not size:
            sys.exit("the node closed the connection: another network, secret or node id, or it is full")
        return self.input.read(int.from_bytes(size, "big"))

    def handshake(self, psk: bytes | None) -> None:  # "Handshake"
        own_id, own_secret = sodium.crypto_sign_keypair()
        static = sodium.crypto_sign_ed25519_sk_to_curve25519(own_secret)
        remote = sodium.crypto_sign_ed25519_pk_to_curve25519(self.node_id)
        name = b"Noise_IK%s_25519_ChaChaPoly_BLAKE2b" % (b"psk1" if psk else b"")
        self.chain = self.hash = name.ljust(64, b"\0")
        self.mix_hash(self.prologue)
        self.mix_hash(remote)
        public, ephemeral = sodium.crypto_box_keypair()
        self.mix_ephemeral(public, psk)
        self.mix_key(sodium.crypto_scalarmult(ephemeral, remote))
        message = public + self.seal_and_hash(sodium.crypto_scalarmult_base(static))
        self.mix_key(sodium.crypto_scalarmult(static, remote))
        if psk:
            self.chain, extra, key = hkdf(self.chain, psk, 3)
            self.mix_hash(extra)
            self.key = key[:32]
        hello = msgpack.packb({"v": 1, "id": own_id, "ua": "raw_client", "t": time.time_ns() // 10**6})
        self.send_message(message + self.seal_and_hash(hello))
        answer = self.receive_message()
        self.mix_ephemeral(answer[:32], psk)
        self.mix_key(sodium.crypto_scalarmult(ephemeral, answer[:32]))
        self.mix_key(sodium.crypto_scalarmult(static, answer[:32]))
        unseal(answer[32:], self.hash, nonce(0), self.key)  # the node's hello: nothing in it is needed here
        self.send_key, self.receive_key = (key[:32] for key in hkdf(self.chain, b"", 2))

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.blake2b(self.hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self.chain, key = hkdf(self.chain, material, 2)
        self.key = key[:32]

    def mix_ephemeral(self, public: bytes, psk: bytes | None) -> None:
        self.mix_hash(public)
        if psk:
            self.mix_key(public)

    def seal_and_hash(self, plaintext: bytes) -> bytes:  # each key seals once, so the nonce is 0
        sealed = seal(plaintext, self.hash, nonce(0), self.key)
        self.mix_hash(sealed)
        return sealed

    def send(self, *messages: list[Any]) -> None:  # "Frames"; before frame 2^20 it would have to rekey
        self.send_message(seal(b"".join(map(msgpack.packb, messages)), b"", nonce(self.sent), self.send_key))
        self.sent += 1

    def receive(self) -> list[list[Any]]:
        plaintext = unseal(self.receive_message(), b"", nonce(self.received), self.receive_key)
        self.received += 1
        return list(msgpack.Unpacker(io.BytesIO(plaintext)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text through a QMesh node.")
    parser.add_argument("address", help="HOST:PORT")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="qmesh-demo")
    parser.add_argument("--network", default="public")
    parser.add_argument("--secret", type=bytes.fromhex, help="of a private network, 64 hex digits")
    options = parser.parse_args()
    session = Session(options.address, options.network, options.secret)
    body = json.dumps({"prompt": options.prompt, "max_tokens": 64, "stream": True}).encode()
    meta = {"path": "/v1/completions", "model": options.model}
    session.send([0, 1, "infer", meta], [1, 1, body], [2, 1, {}])
    rest = b""
    while True:
        for kind, *fields in session.receive():
            if kind == 1:  # DATA: print the whole events in it, and let as much be sent again
                *events, rest = (rest + fields[1]).split(b"\n\n")
                parts = [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]
                print(*(part["choices"][0]["text"] for part in parts), sep="", end="", flush=True)
                session.send([4, 1, len(fields[1])])
            elif kind == 2:  # END
                return print(rest.decode())
            elif kind in (3, 7):  # RESET or GOAWAY
                sys.exit(f"the node refused: code {fields[1]}, {fields[2]}")
            elif kind == 5:  # PING
                session.send([6, fields[0], {}])


if __name__ == "__main__":
    try:
        main()
    except (CryptoError, ValueError) as error:
        sys.exit(f"the node is in another mesh, or no QMesh node: {error}")
