"""Keys and certificates of a federation: TLS for the server, and a key pair for every node.

One folder per machine, so that "which file goes where" is "copy this folder there"::

    ca/       ca.key                                         goes nowhere: keep it offline
    server/   ca.crt server.crt server.key superexec.secret  the SuperLink's machine
    node-0/   ca.crt node.key                                the first node's machine, and so on
    admin/    ca.crt node-0.pub ...                          whoever registers nodes and starts runs
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from compeft_fl.errors import ConfigError

__all__ = ["write_credentials"]

_AUTHORITY_DAYS: Final = 3650
_PRIVATE: Final = 0o600
_PUBLIC: Final = 0o644
_SECRET_BYTES: Final = 32


def write_credentials(
    folder: Path, server_names: Sequence[str], num_nodes: int, days: int = 365
) -> None:
    """Write new keys and certificates into a folder of their own.

    The authority, the server and the nodes get ECDSA keys on P-384, of which Flower's SuperNode
    authentication asks; nodes' keys are in OpenSSH's format, the rest in PEM. Private files are
    readable by their owner only.

    Parameters
    ----------
    folder : Path
        Must not exist: nothing is overwritten.
    server_names : sequence of str
        Host names and IP addresses under which the server is reached, the first as its name.
    num_nodes : int
        Key pairs to make; 0 where the nodes' owners make their own.
    days : int
        How long the server's certificate holds, beginning now; the authority's holds ten years.

    Raises
    ------
    ConfigError
        Where the folder exists, or an argument is out of range.
    """
    if not server_names or not all(name.strip() for name in server_names):
        raise ConfigError("server names: expected at least one host name or IP address")
    if num_nodes < 0 or days < 1:
        raise ConfigError(f"expected nodes >= 0 and days >= 1, found {num_nodes} and {days}")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{folder} exists: keys are never overwritten") from None
    nodes = [f"node-{index}" for index in range(num_nodes)]
    for name in ("ca", "server", "admin", *nodes):
        (folder / name).mkdir(mode=0o700)

    authority_key = ec.generate_private_key(ec.SECP384R1())
    authority = _authority(authority_key)
    server_key = ec.generate_private_key(ec.SECP384R1())
    server = _server(server_key, server_names, days, authority, authority_key)

    _write(folder / "ca" / "ca.key", _pem(authority_key), _PRIVATE)
    _write(folder / "server" / "server.key", _pem(server_key), _PRIVATE)
    _write(
        folder / "server" / "server.crt",
        server.public_bytes(serialization.Encoding.PEM),
        _PUBLIC,
    )
    secret = secrets.token_hex(_SECRET_BYTES).encode()
    _write(folder / "server" / "superexec.secret", secret, _PRIVATE)
    for name in ("server", "admin", *nodes):
        certificate = authority.public_bytes(serialization.Encoding.PEM)
        _write(folder / name / "ca.crt", certificate, _PUBLIC)
    for name in nodes:
        key = ec.generate_private_key(ec.SECP384R1())
        _write(folder / name / "node.key", _openssh(key), _PRIVATE)
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        _write(folder / "admin" / f"{name}.pub", public + b" " + name.encode() + b"\n", _PUBLIC)


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "compeft-fl federation CA")])
    return (
        _builder(name, name, key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    days: int,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_alternative(n) for n in names]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file that nobody else could read at any moment, if it is private."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
