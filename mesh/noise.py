"""The Noise protocol framework, revision 34, as far as QMesh uses it: IK and IKpsk1.

`Noise_IK_25519_ChaChaPoly_BLAKE2b` for an open mesh, `Noise_IKpsk1_25519_ChaChaPoly_BLAKE2b` where a
pre-shared key keeps strangers out. Pure: randomness (the ephemeral key) is handed in. Names follow
the specification (https://noiseprotocol.org/noise.html, sections 5, 7 and 9).
"""

from __future__ import annotations

import hmac
from hashlib import blake2b
from struct import Struct
from typing import Final

from nacl._sodium import ffi, lib
from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
    crypto_scalarmult,
    crypto_scalarmult_base,
)
from nacl.exceptions import CryptoError
from nacl.exceptions import RuntimeError as SodiumError

from mesh.errors import AuthenticationError

KEY_SIZE: Final = 32
_TAG: Final = 16
_NONCE: Final = Struct("<4xQ")  # section 12.4: 32 bits of zeros, then the counter, little-endian
_MAX_NONCE: Final = 2**64 - 1  # reserved for rekey()

# libsodium itself for what every frame passes through: the checks and copies around it in nacl.bindings
# take 3 us a call, three times what the cipher takes for a token.
_seal: Final = lib.crypto_aead_chacha20poly1305_ietf_encrypt
_open: Final = lib.crypto_aead_chacha20poly1305_ietf_decrypt
_NULL: Final = ffi.NULL


class CipherState:
    """One direction's key and nonce counter (section 5.1).

    `nonce` is the number of messages that this state encrypted or decrypted.
    """

    __slots__ = ("_key", "nonce")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes, not {len(key)}")
        self._key = key
        self.nonce = 0

    def encrypt(self, plaintext: bytes) -> bytes:
        """Ciphertext and its 16-byte tag. Raises OverflowError when all nonces are used up."""
        size = len(plaintext)
        sealed = ffi.new("unsigned char[]", size + _TAG)
        _seal(sealed, _NULL, plaintext, size, _NULL, 0, _NULL, self._next_nonce(), self._key)
        self.nonce += 1
        return bytes(ffi.buffer(sealed))

    def decrypt(self, ciphertext: bytes) -> bytes:
        """The plaintext. Raises AuthenticationError; the nonce then stays where it was."""
        size = len(ciphertext) - _TAG
        if size < 0:
            raise AuthenticationError(f"a message of {len(ciphertext)} bytes is too short to authenticate")
        opened = ffi.new("unsigned char[]", size)
        if _open(opened, _NULL, _NULL, ciphertext, size + _TAG, _NULL, 0, self._next_nonce(), self._key) != 0:
            raise AuthenticationError("a message did not authenticate: tampered, replayed or reordered bytes")
        self.nonce += 1
        return bytes(ffi.buffer(opened))

    def rekey(self) -> None:
        """Replace the key by a one-way function of itself (section 4.2); the nonce goes on."""
        self._key = crypto_aead_chacha20poly1305_ietf_encrypt(
            bytes(KEY_SIZE), b"", _NONCE.pack(_MAX_NONCE), self._key
        )[:KEY_SIZE]

    def _next_nonce(self) -> bytes:
        if self.nonce >= _MAX_NONCE:
            raise OverflowError("all nonces of this key are used up")
        return _NONCE.pack(self.nonce)


class Handshake:
    """One side of an IK or IKpsk1 handshake (sections 5.2, 5.3 and 7.5).

    ::

        <- s
        ...
        -> e, es, s, ss (, psk)      initiator: write(), responder: read()
        <- e, ee, se                 responder: write(), initiator: read()

    Keys are 32 bytes. The initiator gives the responder's static public key as `remote_static`; the
    responder learns the initiator's from message 1. With `psk` the pattern is IKpsk1. `ephemeral` must
    be fresh random bytes. Calling the steps out of order is a RuntimeError.
    """

    __slots__ = (
        "_chain", "_ephemeral", "_hash", "_initiator", "_key", "_nonce", "_psk",
        "_remote_ephemeral", "_static", "_static_public", "_step", "remote_static",
    )  # fmt: skip

    def __init__(
        self,
        *,
        initiator: bool,
        prologue: bytes,
        static: bytes,
        ephemeral: bytes,
        remote_static: bytes | None = None,
        psk: bytes | None = None,
    ) -> None:
        if initiator != (remote_static is not None):
            raise ValueError("exactly the initiator of IK knows the other side's static key beforehand")
        name = b"Noise_IKpsk1_25519_ChaChaPoly_BLAKE2b" if psk else b"Noise_IK_25519_ChaChaPoly_BLAKE2b"
        self._chain = self._hash = name.ljust(64, b"\0")
        self._key: bytes | None = None
        self._nonce = 0
        self._initiator = initiator
        self._static: bytes | None = static
        self._static_public: bytes = crypto_scalarmult_base(static)
        self._ephemeral: bytes | None = ephemeral
        self._remote_ephemeral = b""
        self._psk = psk
        self._step = 0
        self.remote_static: bytes | None = remote_static
        self._mix_hash(prologue)
        self._mix_hash(remote_static or self._static_public)

    @property
    def handshake_hash(self) -> bytes:
        """The 64-byte hash of the whole transcript so far; equal on both sides when it is complete."""
        return self._hash

    def write(self, payload: bytes) -> bytes:
        """This side's message with `payload` encrypted in it."""
        self._take_step(writing=True)
        public: bytes = crypto_scalarmult_base(_held(self._ephemeral))
        message = public
        self._mix_ephemeral(public)
        if self._initiator:
            remote = _held(self.remote_static)
            self._mix_key(_dh(_held(self._ephemeral), remote))
            message += self._encrypt_and_hash(self._static_public)
            self._mix_key(_dh(_held(self._static), remote))
            self._mix_psk()
        else:
            self._mix_key(_dh(_held(self._ephemeral), self._remote_ephemeral))
            self._mix_key(_dh(_held(self._ephemeral), _held(self.remote_static)))
        return message + self._encrypt_and_hash(payload)

    def read(self, message: bytes) -> bytes:
        """The payload of the other side's message. Raises AuthenticationError; then all is over."""
        self._take_step(writing=False)
        overhead = KEY_SIZE + _TAG if self._initiator else 2 * KEY_SIZE + 2 * _TAG
        if len(message) < overhead:
            raise AuthenticationError(
                f"a handshake message has at least {overhead} bytes, this one {len(message)}"
            )
        remote, rest = message[:KEY_SIZE], message[KEY_SIZE:]
        self._remote_ephemeral = remote
        self._mix_ephemeral(remote)
        if self._initiator:
            self._mix_key(_dh(_held(self._ephemeral), remote))
            self._mix_key(_dh(_held(self._static), remote))
            return self._decrypt_and_hash(rest)
        self._mix_key(_dh(_held(self._static), remote))
        self.remote_static = self._decrypt_and_hash(rest[: KEY_SIZE + _TAG])
        self._mix_key(_dh(_held(self._static), self.remote_static))
        self._mix_psk()
        return self._decrypt_and_hash(rest[KEY_SIZE + _TAG :])

    def split(self) -> tuple[CipherState, CipherState]:
        """The cipher states to send and to receive with. Drops every secret of the handshake."""
        if self._step != 2:
            raise RuntimeError("the handshake is not complete")
        first, second = _hkdf(self._chain, b"", 2)
        self._step = 3
        self._static = self._ephemeral = self._key = self._psk = None
        self._chain = b""
        initiators, responders = CipherState(first[:KEY_SIZE]), CipherState(second[:KEY_SIZE])
        return (initiators, responders) if self._initiator else (responders, initiators)

    def _take_step(self, *, writing: bool) -> None:
        expected = self._initiator if self._step == 0 else not self._initiator
        if self._step > 1 or writing != expected:
            raise RuntimeError("handshake step out of order")
        self._step += 1

    def _mix_hash(self, data: bytes) -> None:
        self._hash = blake2b(self._hash + data).digest()

    def _mix_key(self, material: bytes) -> None:
        self._chain, key = _hkdf(self._chain, material, 2)
        self._key, self._nonce = key[:KEY_SIZE], 0

    def _mix_ephemeral(self, public: bytes) -> None:
        self._mix_hash(public)
        if self._psk is not None:
            self._mix_key(public)  # section 9.2: with a psk, "e" also feeds the key

    def _mix_psk(self) -> None:
        if self._psk is not None:
            self._chain, extra, key = _hkdf(self._chain, self._psk, 3)
            self._mix_hash(extra)
            self._key, self._nonce = key[:KEY_SIZE], 0

    def _encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext: bytes = crypto_aead_chacha20poly1305_ietf_encrypt(
            plaintext, self._hash, _NONCE.pack(self._nonce), _held(self._key)
        )
        self._nonce += 1
        self._mix_hash(ciphertext)
        return ciphertext

    def _decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        try:
            plaintext: bytes = crypto_aead_chacha20poly1305_ietf_decrypt(
                ciphertext, self._hash, _NONCE.pack(self._nonce), _held(self._key)
            )
        except CryptoError as error:
            raise AuthenticationError(
                "the handshake did not authenticate: another network name, secret or node, or tampered bytes"
            ) from error
        self._nonce += 1
        self._mix_hash(ciphertext)
        return plaintext


def _hkdf(chain: bytes, material: bytes, outputs: int) -> list[bytes]:
    """Section 4.3: HMAC-BLAKE2b expansion to two or three 64-byte outputs."""
    secret = hmac.digest(chain, material, blake2b)
    made: list[bytes] = []
    previous = b""
    for index in range(1, outputs + 1):
        previous = hmac.digest(secret, previous + bytes([index]), blake2b)
        made.append(previous)
    return made


def _dh(secret: bytes, public: bytes) -> bytes:
    try:
        shared: bytes = crypto_scalarmult(secret, public)
    except (CryptoError, SodiumError) as error:  # libsodium refuses points of low order
        raise AuthenticationError("the peer sent an X25519 key of low order") from error
    return shared


def _held(secret: bytes | None) -> bytes:
    if secret is None:
        raise RuntimeError("this secret was dropped or is not known yet")
    return secret
