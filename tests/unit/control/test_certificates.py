"""Our own authority: its certificate is trusted by the strictest client, and signs for the address it was asked for."""

from __future__ import annotations

import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from comfyfleet.clock import SystemClock
from comfyfleet.control.certificates import CertificateAuthority
from comfyfleet.wire.errors import BadRequest


@pytest.fixture(scope="module")
def key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def a_request(key, encoding=serialization.Encoding.DER) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "worker")])
    return (
        x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256()).public_bytes(encoding)
    )


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, address: str) -> None:
    """A whole TLS handshake over a socket pair, verified by the client."""
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(far, server_side=True).close()
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(near, server_hostname=address) as tls:
            tls.read(1)
    finally:
        near.close()
        thread.join()


@pytest.mark.parametrize("encoding", [serialization.Encoding.DER, serialization.Encoding.PEM])
def test_a_signed_worker_is_trusted_at_its_address_and_nowhere_else(tmp_path, key, encoding):
    authority = CertificateAuthority.open(tmp_path / "ca", SystemClock())
    (tmp_path / "worker.pem").write_text(authority.sign(a_request(key, encoding), "127.0.0.1"))
    (tmp_path / "worker.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "worker.pem", tmp_path / "worker.key")
    client = ssl.create_default_context(cadata=authority.pem)
    client.verify_flags |= ssl.VERIFY_X509_STRICT

    handshake(server, client, "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client, "127.0.0.2")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, ssl.create_default_context(), "127.0.0.1")


def test_the_authority_is_the_same_after_a_restart(tmp_path):
    first, second = (CertificateAuthority.open(tmp_path, SystemClock()) for _ in range(2))
    assert first.pem == second.pem


@pytest.mark.parametrize("body", [b"", b"hello", b"-----BEGIN CERTIFICATE REQUEST-----\nxx\n-----END-----"])
def test_what_is_no_signing_request_is_refused(tmp_path, body):
    with pytest.raises(BadRequest):
        CertificateAuthority.open(tmp_path, SystemClock()).sign(body, "127.0.0.1")


def test_a_request_signed_by_another_key_is_refused(tmp_path, key):
    raw = bytearray(a_request(key))
    raw[-1] ^= 1
    with pytest.raises(BadRequest):
        CertificateAuthority.open(tmp_path, SystemClock()).sign(bytes(raw), "127.0.0.1")
