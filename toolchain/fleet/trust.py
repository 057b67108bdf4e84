"""Who is who in an endpoint over many hosts: its own certificate authority, and the certificates that it gives.

The head's machine keeps the authority. A node makes its key itself and sends a request to be signed; the key never
leaves it. A certificate's common name is the party's name: etcd and NATS take it as the user. Nothing here knows how a
request comes, nor what a party may do.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain import workspace
from toolchain.errors import ArtifactError, RejectedError, ToolError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

HEAD = "head"
"""The head's name as a client."""
SERVER = "server"
"""Its servers' name."""
NODE_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_RESERVED = frozenset({HEAD, SERVER, "root", "localhost"})
_AUTHORITY_LASTS, _PARTY_LASTS = datetime.timedelta(days=3650), datetime.timedelta(days=365)
_SKEW = datetime.timedelta(days=1)
"""A clock that is wrong by less does not lock its machine out."""
_MOST_REQUEST_BYTES = 8192


@dataclass(frozen=True)
class Certificates:
    """What a party is given for its key, in PEM."""

    named: bytes
    nameless: bytes


@dataclass(frozen=True)
class Identity:
    """One party's files: the authority's certificate, which is all that it trusts, its own, and its key."""

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    @property
    def nameless(self) -> Path:
        """A certificate of the same key that names nobody: for etcd's JSON, which refuses others."""
        return self.folder / "nameless.pem"

    @property
    def whole(self) -> bool:
        """Whether all files are there."""
        return all(file.is_file() for file in (self.authority, self.certificate, self.nameless, self.key))

    def write(self, authority: bytes, certificates: Certificates, key: bytes | None = None) -> None:
        """PEM; without ``key``, the one that is there."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if key is not None:
            write_private(self.key, key)
        workspace.write_durably(self.authority, authority)
        workspace.write_durably(self.certificate, certificates.named)
        workspace.write_durably(self.nameless, certificates.nameless)

    def client_context(self, *, nameless: bool = False) -> ssl.SSLContext:
        """For connections to the head's servers. Raises ArtifactError."""
        try:
            context = trusting(self.authority.read_text(encoding="ascii"))
            context.load_cert_chain(self.nameless if nameless else self.certificate, self.key)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ArtifactError(f"{self.folder}: not a usable identity: {error}") from error
        return context


def trusting(authority_pem: str) -> ssl.SSLContext:
    """A client's context that trusts this authority and no other. Raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority_pem)
    return context


def fingerprint(authority_pem: str) -> str:
    """sha256 (hex) of the certificate's DER. Raises RejectedError for what is none."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(authority_pem)).hexdigest()
    except ValueError:
        raise RejectedError("not a certificate in PEM") from None


def check_node_name(name: str) -> str:
    """The name. Raises RejectedError for one that is not a node's."""
    if not NODE_NAME.fullmatch(name) or name in _RESERVED:
        raise RejectedError(
            f"{name!r} is not a node's name: lower case letters, digits and hyphens, a letter first, at most 40, "
            f"and none of {', '.join(sorted(_RESERVED))}"
        )
    return name


def write_private(path: Path, data: bytes) -> None:
    """A file that its owner alone may read, from its first byte on; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def make_request(identity: Identity, name: str, *, again: bool = False) -> bytes:
    """A node's key, kept in ``identity``, and its request for a certificate (PEM). ``again``: for the key that is there
    already. Raises ArtifactError where that cannot be read.
    """
    _require()
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    if again:
        key = _key_in(identity.key)
    else:
        key = _new_key()
        identity.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(identity.key, _pem_of(key))
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name)).sign(key, hashes.SHA256())
    return _pem(request)


class Authority:
    """An endpoint's own. Made at first use, in a folder that its owner alone may read."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        _require()
        from cryptography import x509

        self._folder = folder
        self.lasts = _PARTY_LASTS
        """How long the certificates that it gives are good."""
        certificate, key = folder / "ca.pem", folder / "ca-key.pem"
        if not certificate.exists():
            self._make(certificate, key, endpoint)
        self.pem = certificate.read_bytes()
        try:
            self._certificate = x509.load_pem_x509_certificate(self.pem)
        except ValueError as error:
            raise ArtifactError(f"{folder}: not a usable certificate authority: {error}") from error
        self._key = _key_in(key)

    def _make(self, certificate: Path, key: Path, endpoint: str) -> None:
        from cryptography import x509

        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = _new_key()
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # certificates, lists
        builder = _builder(_subject(f"scalellm {endpoint}"), made.public_key(), _AUTHORITY_LASTS)
        builder = builder.issuer_name(_subject(f"scalellm {endpoint}"))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(usage, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(made.public_key()), critical=False)
        write_private(key, _pem_of(made))
        workspace.write_durably(certificate, _pem(_signed(builder, made)))

    @property
    def fingerprint(self) -> str:
        """What a token carries, so that a joining node trusts nobody else."""
        return fingerprint(self.pem.decode("ascii"))

    def issue(self, identity: Identity, name: str, *, hosts: Iterable[str] = ()) -> None:
        """A key and a certificate for a party on this machine; with ``hosts`` (addresses or names), for its servers."""
        key = _new_key()
        identity.write(self.pem, self._certify(name, key.public_key(), [name, *hosts]), _pem_of(key))

    def sign(self, request: bytes, node: str) -> Certificates:
        """For a node that sends a request of its own. It can be a client, never a server; only its key is taken from
        the request. Raises RejectedError.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        check_node_name(node)
        if len(request) > _MOST_REQUEST_BYTES:
            raise RejectedError("the request for a certificate is too long")
        try:
            found = x509.load_pem_x509_csr(request)
        except ValueError:
            raise RejectedError("not a request for a certificate") from None
        key = found.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise RejectedError("a node's key is of the curve P-256")
        if not found.is_signature_valid:
            raise RejectedError("the request for a certificate is not signed by its own key")
        return self._certify(node, key, [node], server=False)

    def _certify(
        self, name: str, key: ec.EllipticCurvePublicKey, names: Iterable[str], *, server: bool = True
    ) -> Certificates:
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        known_as = x509.SubjectAlternativeName([_name(one) for one in names])
        found = []
        for subject in (_subject(name), x509.Name([])):
            builder = _builder(subject, key, self.lasts).issuer_name(self._certificate.subject)
            builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            builder = builder.add_extension(known_as, critical=not list(subject))
            builder = builder.add_extension(authority, critical=False)
            found.append(_pem(_signed(builder, self._key)))
        return Certificates(*found)


def _new_key() -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _key_in(file: Path) -> ec.EllipticCurvePrivateKey:
    """Raises ArtifactError."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found: ec.EllipticCurvePrivateKey = load_pem_private_key(file.read_bytes(), None)  # type: ignore[assignment]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not a usable key: {error}") from error
    return found


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _pem(thing: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return thing.public_bytes(Encoding.PEM)


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, lasts: datetime.timedelta) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + lasts)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA256())


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _require() -> None:
    """Raises ToolError where the library is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ToolError(
            "an endpoint over many hosts needs cryptography, which is not installed",
            hint="pip install 'scalellm-toolchain[fleet]'",
        ) from error
