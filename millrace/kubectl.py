"""kubectl as a child process: who may do what, and how a cluster is reached, stays kubectl's business.

Only reads. The values of secrets never leave kubectl: it is asked for their names and keys.
"""

import json
import shutil
import subprocess
from typing import Any

from pipeline.errors import ConfigurationError, DependencyError

_REQUEST_SECONDS = 15
# kubectl may first have to ask a program for a token, and then asks several kinds one after the other.
_CALL_SECONDS = 60.0
# What kubectl prints when there is nobody to answer, or nobody who lets us in.
_UNREACHABLE = (
    "connection to the server",
    "Unable to connect to the server",
    "dial tcp",
    "You must be logged in",
    "Unauthorized",
    "context deadline exceeded",
    "i/o timeout",
    "getting credentials",
    "x509:",
)
_ABSENT = ("(NotFound)", "the server could not find", "the server doesn't have a resource type")

Item = dict[str, Any]


class AbsentError(Exception):
    """The cluster does not have what was asked for: a kind, an object or an API."""


class RefusedError(Exception):
    """The cluster answers that this was wrong, or is not allowed; the message is its own."""


class Kubectl:
    """One cluster, through one context of the user's configuration."""

    def __init__(self, context: str | None = None) -> None:
        """Find the program.

        Raises:
            ConfigurationError: there is none.
        """
        program = shutil.which("kubectl")
        if program is None:
            raise ConfigurationError(
                "no kubectl on PATH: install it (https://kubernetes.io/docs/tasks/tools/)"
            )
        self._command = [program, f"--request-timeout={_REQUEST_SECONDS}s"]
        if context is not None:
            self._command.append(f"--context={context}")

    def items(self, kinds: str, *arguments: str) -> list[Item]:
        """Return the objects of one or more kinds (`pods,nodes`); the rest as `kubectl get` takes it.

        Raises:
            AbsentError, RefusedError, DependencyError: see `get`.
        """
        answer = json.loads(self.get(kinds, "--output=json", *arguments))
        found: list[Item] = answer.get("items", [answer])
        return found

    def raw(self, path: str) -> Item:
        """Return what the API server answers to a path.

        Raises:
            AbsentError, RefusedError, DependencyError: see `get`.
        """
        answer: Item = json.loads(self.get(f"--raw={path}"))
        return answer

    def get(self, *arguments: str) -> str:
        """Run `kubectl get`; blocks for a minute at most.

        Raises:
            AbsentError: the kind, object or path is not there.
            RefusedError: not allowed, or another answer that is no success.
            DependencyError: no API server answers, or it does not know us.
        """
        return self._run("get", *arguments)

    def version(self) -> Item:
        """Return `kubectl version` of both sides.

        Raises:
            AbsentError, RefusedError, DependencyError: see `get`.
        """
        answer: Item = json.loads(self._run("version", "--output=json"))
        return answer

    def _run(self, *arguments: str) -> str:
        try:
            ran = subprocess.run(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise DependencyError(f"kubectl {arguments[0]} took longer than {_CALL_SECONDS:g} s") from None
        except OSError as error:
            raise ConfigurationError(f"cannot run {self._command[0]}: {error.strerror}") from None
        if ran.returncode == 0:
            return ran.stdout
        said = (ran.stderr.strip() or "no reason given").splitlines()[-1]
        # Before "not there": an answer such as "Unable to connect ... NotFound" is about the way there.
        if any(text in ran.stderr for text in _UNREACHABLE):
            raise DependencyError(f"the cluster cannot be reached: {said}")
        if any(text in ran.stderr for text in _ABSENT):
            raise AbsentError(said)
        raise RefusedError(said.removeprefix("Error from server "))
