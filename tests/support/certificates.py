"""Keys and certificates for tests, each signed by an authority of its own."""

from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)


class Identity:
    """PEM files: `certificate`, `key`, the `authority` that signed it; `store` and `trusted` for a broker."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kinds = ("crt", "key", "ca.crt", "store.pem", "trusted.pem")
        self.certificate, self.key, self.authority, self.store, self.trusted = (
            folder / f"{name}.{kind}" for kind in kinds
        )
        authority = trustme.CA(organization_name=name)
        issued = authority.issue_cert("127.0.0.1", "localhost", common_name=name)
        self.authority.write_bytes(authority.cert_pem.bytes())
        self.trusted.write_bytes(authority.cert_pem.bytes())
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        # Java reads no other form.
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        self.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.store.write_bytes(self.key.read_bytes() + self.certificate.read_bytes())

    def trust(self, other: "Identity") -> None:
        """Accept what another identity's authority signed."""
        with self.trusted.open("ab") as file:
            file.write(other.authority.read_bytes())

    def broker_properties(self) -> dict[str, str]:
        """Return what a broker needs to be this identity and to trust whom it trusts."""
        return {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.trusted),
        }
