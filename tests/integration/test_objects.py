"""The object store on a real folder and, over HTTP, against a server that speaks enough of S3."""

import asyncio
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.errors import (
    ConfigurationError,
    ContractError,
    DependencyError,
    ImageTooLargeError,
    MissingImageError,
)
from pipeline.events import MAX_OBJECT_KEY_CHARACTERS, OBJECT_KEY
from pipeline.objects import ObjectStore, dead_letter_key, image_key
from pipeline.settings import load
from tests.support.mounts import MountedSecret

SHA = hashlib.sha256(b"picture").hexdigest()


class Bucket(BaseHTTPRequestHandler):
    """Objects in memory, put, got and deleted as S3 does it; `broken` answers 503."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}
    broken: ClassVar[bool] = False
    key_id: ClassVar[str] = "test"

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(503 if self.broken else 200)

    def parse_request(self) -> bool:
        """Refuse requests that another key has signed."""
        whole = super().parse_request()
        if whole and f"Credential={self.key_id}/" not in self.headers["Authorization"]:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(403)
            return False
        return whole

    def do_GET(self) -> None:
        found = self.objects.get(self.path)
        self._answer(503 if self.broken else 404 if found is None else 200, found or b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """DeleteObjects, the only POST there is."""
        request = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", request)
        for key in keys:
            self.objects.pop(f"/bucket/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(503 if self.broken else 200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 12:00:00 GMT")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    """Yield the bucket behind `s3://bucket` of this process's environment."""

    class Fresh(Bucket):
        objects: ClassVar[dict[str, bytes]] = {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "eu-west-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield Fresh
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["folder", "file", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    if request.param == "s3":
        request.getfixturevalue("s3")
    urls = {
        "folder": str(tmp_path / "a b"),
        "file": (tmp_path / "a b").as_uri(),
        "s3": "s3://bucket/some/where",
    }
    opened = ObjectStore.open(load(object_store_url=urls[request.param]))
    yield opened
    opened.close()


async def test_what_is_put_is_got(store: ObjectStore) -> None:
    """An object comes back as it was put; putting again replaces it; deleting twice is no error."""
    key = image_key("../../etc/passwd", SHA)
    await store.put(key, b"old")
    await store.put(key, b"picture")
    assert await store.get(key, 7) == b"picture"
    await store.put("empty", b"")
    assert await store.get("empty", 0) == b""
    await store.delete([key, "empty", "never/there"])
    await store.delete([key])
    with pytest.raises(MissingImageError, match="there is no object"):
        await store.get(key, 7)
    await store.ping()


async def test_a_large_object_is_refused_unread(store: ObjectStore) -> None:
    """The size is checked before the bytes are read, to the byte."""
    await store.put("large", b"x" * 1001)
    assert len(await store.get("large", 1001)) == 1001
    with pytest.raises(ImageTooLargeError, match="1,001 bytes, the limit is 1,000"):
        await store.get("large", 1000)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        ".",
        "a/./b",
        "~/x",
        "a\x00b",
        "a b",
        "ä",
        "a" * 513,
    ],
)
async def test_no_key_leads_out_of_the_store(store: ObjectStore, key: str) -> None:
    """Keys that are path tricks, or that stores read differently, are refused before anything is asked."""
    for call in (store.put(key, b""), store.get(key, 1), store.delete([key])):
        with pytest.raises(ContractError):
            await call


@pytest.mark.parametrize("image_id", ["a", "../../etc/passwd", "\x00", "x" * 10_000, "ä/ö", "a\ud7ff"])
def test_keys_come_from_digests(image_id: str) -> None:
    """Any id gives a safe key, the same each time, and another picture another one."""
    keys = {image_key(image_id), image_key(image_id, SHA), dead_letter_key(image_id, "t", 1, 2)}
    assert len(keys) == 3
    assert keys == {image_key(image_id), image_key(image_id, SHA), dead_letter_key(image_id, "t", 1, 2)}
    for key in keys:
        assert OBJECT_KEY.fullmatch(key)
        assert len(key) <= MAX_OBJECT_KEY_CHARACTERS


async def test_a_folder_is_listed(tmp_path: Path) -> None:
    """A listing has every object below a folder with its size, and no other."""
    store = ObjectStore.open(load(object_store_url=str(tmp_path)))
    keys = [image_key(str(number), SHA) for number in range(1500)]
    await asyncio.gather(*(store.put(key, b"abc") for key in keys), store.put("other/x", b""))
    pages = [page async for page in store.list("images")]
    assert sorted(item.key for page in pages for item in page) == sorted(keys)
    assert len(pages) > 1
    assert {item.size_bytes for page in pages for item in page} == {3}
    store.close()


async def test_a_reader_never_sees_half_an_object(tmp_path: Path) -> None:
    """While an object is replaced over and over, a reader sees one version or the other, whole."""
    store = ObjectStore.open(load(object_store_url=str(tmp_path)))
    versions = [bytes([number]) * 300_000 for number in range(2)]
    await store.put("x", versions[0])

    async def replace() -> None:
        for number in range(50):
            await store.put("x", versions[number % 2])

    writing = asyncio.ensure_future(replace())
    while not writing.done():
        assert await store.get("x", 300_000) in versions
    await writing
    assert os.listdir(tmp_path) == ["x"]
    store.close()


async def test_an_unwritable_folder_is_a_dependency_error(tmp_path: Path) -> None:
    """A folder that went away, or a full disk, is waited for."""
    folder = tmp_path / "objects"
    store = ObjectStore.open(load(object_store_url=str(folder)))
    folder.rmdir()
    folder.write_text("now a file")
    with pytest.raises(DependencyError):
        await store.put("a/b", b"x")
    store.close()


async def test_a_broken_bucket_is_a_dependency_error(
    s3: type[Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that answers 503, or not at all, is waited for; it is not a missing picture."""
    store = ObjectStore.open(load(object_store_url="s3://bucket"))
    await store.put("x", b"x")
    monkeypatch.setattr(s3, "broken", True)
    for call in (store.put("x", b"x"), store.get("x", 1), store.delete(["x"]), store.ping()):
        with pytest.raises(DependencyError, match="object store"):
            await call
    store.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    absent = ObjectStore.open(load(object_store_url="s3://bucket"))
    with pytest.raises(DependencyError):
        await absent.get("x", 1)
    absent.close()


async def test_changed_credentials_are_read_again(
    s3: type[Bucket], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The key of a bucket is that of the mounted folder; while it is half-written, the former one is used."""
    folder = tmp_path / "mounted"
    mounted = MountedSecret(folder, {"AWS_ACCESS_KEY_ID": "first", "AWS_SECRET_ACCESS_KEY": "x"})
    store = ObjectStore.open(load(object_store_url="s3://bucket", object_store_credentials=folder))
    with pytest.raises(DependencyError):
        await store.put("x", b"x")
    monkeypatch.setattr(s3, "key_id", "first")
    await store.put("x", b"x")
    mounted.replace({"AWS_ACCESS_KEY_ID": ""})
    assert await store.get("x", 1) == b"x"
    monkeypatch.setattr(s3, "key_id", "second")
    with pytest.raises(DependencyError):
        await store.get("x", 1)
    mounted.replace({"AWS_ACCESS_KEY_ID": "second\n"})
    assert await store.get("x", 1) == b"x"
    store.close()


@pytest.mark.parametrize(
    ("url", "files", "reason"),
    [
        ("s3://bucket", {}, "no file in it"),
        ("s3://bucket", {"AWS_ACCESS_KEY_ID": ""}, "an empty one"),
        ("s3://bucket", {"PASSWORD": "x"}, "'password' is not valid"),
        ("objects", {"AWS_ACCESS_KEY_ID": "x"}, "is for buckets"),
    ],
)
def test_credentials_that_cannot_be_used(
    url: str, files: dict[str, str | bytes], reason: str, tmp_path: Path
) -> None:
    """Credentials that no bucket takes end the start with one line that names the setting."""
    folder = MountedSecret(tmp_path / "mounted", files).folder
    with pytest.raises(ConfigurationError, match=f"MILLRACE_OBJECT_STORE_CREDENTIALS: .*{reason}"):
        ObjectStore.open(load(object_store_url=url, object_store_credentials=folder))


@pytest.mark.parametrize(
    "url", ["ftp://x", "s3://", "http://host/x", "file://host/x", "memory:///", "az://box", "a\x00b"]
)
def test_a_wrong_url_names_the_setting(url: str) -> None:
    """A URL that names no store ends the start with one line that names the setting."""
    with pytest.raises(ConfigurationError, match="MILLRACE_OBJECT_STORE_URL") as raised:
        ObjectStore.open(load(object_store_url=url))
    assert "\n" not in raised.value.message


def test_a_process_may_end_right_after_a_call(tmp_path: Path) -> None:
    """Ending the process just after a call never aborts it, as obstore's own coroutines do now and then."""
    program = (
        "import asyncio, sys; from pipeline.objects import ObjectStore; from pipeline.settings import load\n"
        "async def main():\n"
        "    store = ObjectStore.open(load(object_store_url=sys.argv[1]))\n"
        "    await store.put('x', b'x'); await store.get('x', 1); await store.ping()\n"
        "asyncio.run(main())"
    )
    codes = {subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode for _ in range(8)}
    assert codes == {0}
