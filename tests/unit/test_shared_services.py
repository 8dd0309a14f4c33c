"""How the processes of one test run share their services and end."""

import threading
from pathlib import Path

from tests.support.services import Service, Share, close


def test_two_processes_that_each_started_what_the_other_uses_both_end(tmp_path: Path) -> None:
    stopped: list[str] = []

    def share(name: str) -> Share:
        return Share(tmp_path, name, lambda folder: Service(folder.name, lambda: stopped.append(name)))

    ones = [share("kafka"), share("postgres")]
    others = [share("postgres"), share("kafka")]
    for one in ones[0], others[0], ones[1], others[1]:
        one.address()
    enders = [threading.Thread(target=close, args=(shares,), daemon=True) for shares in (ones, others)]
    for ender in enders:
        ender.start()
    for ender in enders:
        ender.join(10)
    assert sorted(stopped) == ["kafka", "postgres"]
    assert not any(ender.is_alive() for ender in enders)


def test_what_somebody_uses_is_not_stopped(tmp_path: Path) -> None:
    stopped = threading.Event()
    starter = Share(tmp_path, "kafka", lambda folder: Service(folder.name, stopped.set))
    user = Share(tmp_path, "kafka", lambda _folder: Service("a second broker", stopped.set))
    assert starter.address() == user.address()
    ender = threading.Thread(target=close, args=([starter],), daemon=True)
    ender.start()
    assert not stopped.wait(0.3)
    user.release()
    ender.join(10)
    assert stopped.is_set()
