"""The control plane's own certificate authority, made at first start: what `/static/jvastai_root.cer` serves.

Clients add it to their trust; a worker's certificate signed here, with the worker's address in it, then verifies.
"""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from comfyfleet.clock import Clock
from comfyfleet.control.keys import secret_file
from comfyfleet.wire.errors import BadRequest

CA_YEARS = 10
WORKER_DAYS = 365


class CertificateAuthority:
    """A P-256 root in two files of the data directory: `ca.key` (0600) and `ca.pem`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, clock: Clock) -> None:
        self._key = key
        self._certificate = certificate
        self._clock = clock
        self.pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    @classmethod
    def open(cls, folder: Path, clock: Clock) -> CertificateAuthority:
        """Load both files, or make them."""
        fresh = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        key = serialization.load_pem_private_key(secret_file(folder / "ca.key", fresh.strip())[0], password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"{folder / 'ca.key'} holds no elliptic-curve key")
        pem, _ = secret_file(folder / "ca.pem", _root(key, clock).public_bytes(serialization.Encoding.PEM).strip())
        return cls(key, x509.load_pem_x509_certificate(pem), clock)

    def sign(self, request: bytes, address: str) -> str:
        """A worker's certificate (PEM) for its signing request; `address` (IP or name) is put into it.

        Raises BadRequest for what is no signing request, or one not signed by its own key.
        """
        try:
            wanted = (x509.load_pem_x509_csr if request.lstrip().startswith(b"-----") else x509.load_der_x509_csr)(
                request
            )
            is_signed = wanted.is_signature_valid
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadRequest("the body is no certificate signing request") from error
        if not is_signed:
            raise BadRequest("the signing request is not signed by its own key")
        now = datetime.datetime.fromtimestamp(self._clock.now(), datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(wanted.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=WORKER_DAYS))
            .add_extension(x509.SubjectAlternativeName([_general_name(address)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(wanted.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _root(key: ec.EllipticCurvePrivateKey, clock: Clock) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "comfyfleet root")])
    now = datetime.datetime.fromtimestamp(clock.now(), datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=365 * CA_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
