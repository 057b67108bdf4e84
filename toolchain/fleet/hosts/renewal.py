"""When a certificate runs out, and whether its owner may have another one. It asks nobody and writes nothing."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from toolchain.errors import ArtifactError, RejectedError

if TYPE_CHECKING:
    from cryptography import x509

    from toolchain.fleet.trust import Authority, Identity

BEFORE = datetime.timedelta(days=30)
"""With less than this left, a node asks for another one: our choice, of the 365 days that one lasts."""


def left(identity: Identity) -> datetime.timedelta:
    """How long the party's certificate is still good; negative where it has run out. Raises ArtifactError."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{identity.certificate}: not a certificate: {error}") from error
    return found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)


def check(authority: Authority, node: str, certificate: bytes, request: bytes) -> None:
    """Raises RejectedError unless this authority gave the certificate to that node, it is still good, and the request
    is for its very key. That its sender has the key, the request's signature shows: ``Authority.sign`` looks at it.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        present, wanted = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_csr(request)
        present.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.pem))
    except (ValueError, TypeError, InvalidSignature):
        raise RejectedError("the present certificate is not one of this endpoint") from None
    if _name_of(present) != node or present.public_key() != wanted.public_key():
        raise RejectedError("the present certificate is another one's")
    if present.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise RejectedError("the present certificate has run out")


def _name_of(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""
