"""What requests say, read as the standards say: ids in paths, preferences, keys, hosts."""

import contextlib
import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from gateway.boundary import check_host, check_query, undecoded_path
from gateway.images import content_disposition, parse_idempotency_key
from gateway.intake import check_given_id, id_of_key
from gateway.predictions import wait_seconds
from gateway.problems import Problem
from gateway.views import links
from pipeline.settings import LOOPBACK_HOSTS

ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=200)


@given(ids)
def test_an_id_survives_its_link(image_id: str) -> None:
    """An id is one segment of its links, and decoding the segment gives the id back."""
    _, v1, images, segment, content = links(image_id).content.split("/")
    assert (v1, images, content) == ("v1", "images", "content")
    assert unquote(segment, errors="strict") == image_id
    assert undecoded_path({"raw_path": links(image_id).self.encode(), "path": "/"}) == links(image_id).self


@given(ids, st.sampled_from(["image/jpeg", "image/svg+xml", "application/octet-stream"]))
def test_a_file_name_cannot_break_its_header(image_id: str, media_type: str) -> None:
    """Whatever an id contains, the header has one quoted name, one encoded one, and nothing else."""
    header = content_disposition(image_id, media_type)
    assert re.fullmatch(
        r"(inline|attachment); filename=\"[A-Za-z0-9_.+-]+\"; filename\*=UTF-8''[A-Za-z0-9%_.~+-]+", header
    )
    assert header.startswith("inline") == (media_type == "image/jpeg")


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, 0),
        (["wait=10"], 10),
        (["respond-async, wait=5"], 5),
        (["respond-async", 'WAIT = "7"'], 7),
        (["wait=7; foo=bar"], 7),
        (["wait=1000"], 60),
        (["wait=3, wait=9"], 3),
        (["wait"], 0),
        (["wait=-1"], 0),
        (["wait=1.5"], 0),
        (["wait=٣"], 0),
        (["await=5"], 0),
        (["return=minimal"], 0),
        ([",;=,"], 0),
    ],
)
def test_preferences_are_read_as_rfc_7240_says(prefer: list[str] | None, seconds: int) -> None:
    """A wait is bounded, and a preference that cannot be read counts as absent."""
    assert wait_seconds(prefer) == seconds


@given(st.lists(st.text(max_size=50), max_size=3))
def test_any_preference_can_be_read(prefer: list[str]) -> None:
    """No header makes reading preferences fail."""
    assert 0 <= wait_seconds(prefer) <= 60


@pytest.mark.parametrize(
    ("header", "key"),
    [('"abc"', "abc"), ("abc", "abc"), (r'"a\"b\\c"', 'a"b\\c'), (' "a b" ', "a b"), ('"', '"')],
)
def test_an_idempotency_key_may_be_quoted_or_bare(header: str, key: str) -> None:
    """The structured-field string of the draft and the bare form of many clients name the same key."""
    assert parse_idempotency_key(header) == key


@pytest.mark.parametrize("header", ["", '""', "ü", "a\tb", "x" * 256])
def test_an_unusable_idempotency_key_is_refused(header: str) -> None:
    """Empty, long or unprintable keys are a problem, not another key."""
    with pytest.raises(Problem, match="invalid_request"):
        parse_idempotency_key(header)


def test_a_key_names_the_same_event_for_ever() -> None:
    """The derivation of the id is a contract: clients that repeat after an upgrade must meet their event."""
    assert id_of_key("k-1") == "key-d9b91a9339cf77cf12b1d33f68e9c248fc4c9bcf"
    assert id_of_key("k-1", 1) != id_of_key("k-1")


@pytest.mark.parametrize("image_id", ["", ".", "..", "a\nb", "\x00", "\x85", "x" * 513])
def test_an_id_that_cannot_be_an_identity_is_refused(image_id: str) -> None:
    """Nothing a URL or the database could not carry becomes an id."""
    with pytest.raises(Problem, match="invalid_request"):
        check_given_id(image_id)


@pytest.mark.parametrize(
    ("host", "origin", "code"),
    [
        ("localhost:8040", None, None),
        ("127.0.0.1", "http://localhost:8080", None),
        ("[::1]:8040", "http://[::1]:8080", None),
        ("evil.example", None, "forbidden_host"),
        ("localhost.evil.example", None, "forbidden_host"),
        ("", None, "forbidden_host"),
        ("[", None, "forbidden_host"),
        ("localhost", "https://evil.example", "forbidden_origin"),
        ("localhost", "null", "forbidden_origin"),
        ("localhost", "http://localhost@evil.example", "forbidden_origin"),
    ],
)
def test_only_this_machine_may_speak_to_a_loopback_gateway(
    host: str, origin: str | None, code: str | None
) -> None:
    """A rebound name or a page of another site is told apart from this machine's."""
    headers = Headers({"host": host} | ({"origin": origin} if origin else {}))
    if code is None:
        check_host(headers, LOOPBACK_HOSTS)
    else:
        with pytest.raises(Problem, match=code):
            check_host(headers, LOOPBACK_HOSTS)


@given(st.binary(max_size=60))
def test_any_query_is_read_or_refused(query: bytes) -> None:
    """A query is percent-encoded UTF-8 or a problem; nothing is silently replaced."""
    with contextlib.suppress(Problem):
        check_query(query)
        assert query.isascii()
