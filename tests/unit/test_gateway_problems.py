"""Problems: every error has one, and none says too much."""

from collections.abc import Iterator

import pytest
from starlette.exceptions import HTTPException

from gateway import problems
from gateway.problems import KINDS, Problem
from pipeline import errors
from pipeline.errors import MillraceError


def tree(kind: type[MillraceError]) -> Iterator[type[MillraceError]]:
    for child in kind.__subclasses__():
        if child.__module__ == "pipeline.errors":
            yield child
            yield from tree(child)


def test_every_error_of_the_tree_has_a_problem() -> None:
    """Each error code is an HTTP answer, except those that end the process."""
    codes = {kind.code for kind in tree(MillraceError)}
    assert codes - {"fatal", "configuration"} <= KINDS.keys()


@pytest.mark.parametrize("code", KINDS)
def test_a_problem_is_what_rfc_9457_says(code: str) -> None:
    """Type, title, status and detail agree with each other and with the answer's own status."""
    response = Problem(code, "Why.").response()
    document = Problem(code, "Why.").document()
    assert (response.status_code, response.media_type) == (document["status"], "application/problem+json")
    assert document["type"] == f"urn:millrace:problem:{code}"
    assert document["title"] == KINDS[code][1]
    assert ("retry-after" in response.headers) == (document["status"] == 503)


def test_a_dependency_is_not_described_to_clients() -> None:
    """Hosts and accounts in a dependency's error, or a fatal one's, stay in the log."""
    for error in (errors.DependencyError("broker-7.internal: user x"), errors.FatalError("stack at 0x7f")):
        detail = problems.from_error(error).detail
        assert "internal:" not in detail
        assert "0x7f" not in detail
    assert (
        problems.from_error(errors.ContractError("the event id is empty")).detail == "the event id is empty"
    )


def test_an_unknown_status_of_the_framework_is_still_a_problem() -> None:
    """What the framework refuses keeps its status, whatever it is."""
    found = problems.from_http(HTTPException(418))
    assert (found.status, found.code, found.detail) == (418, "http", "I'm a Teapot")
