"""Writing in the background: in order, all of it, and nobody waits for the disk."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.errors import RunDirectoryError
from ray_abliterate.pipeline import background_writer as background
from ray_abliterate.pipeline.background_writer import BackgroundWriter


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(background, "SLOW_SECONDS", 0.05)


def refusing(times: int, work: Callable[[], None]) -> Callable[[], None]:
    left = [times]

    def attempt() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        work()

    return attempt


def test_everything_is_written_in_order_before_the_end(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    with BackgroundWriter() as writer:
        for number in range(200):
            writer.submit(lambda n=number: file.open("a").write(f"{n}\n"))
        writer.flush()
        assert file.read_text().split() == [str(n) for n in range(200)]
        writer.submit(lambda: file.open("a").write("last\n"))
    assert file.read_text().endswith("last\n")


def test_a_slow_disk_keeps_nobody_waiting_and_is_told_of_once() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    free = threading.Event()
    with BackgroundWriter(lambda event, **details: told.append((event, details))) as writer:
        writer.submit(lambda: free.wait(10) and None)
        time.sleep(0.1)
        began = time.monotonic()
        for _ in range(100):
            writer.submit(lambda: None)
        assert time.monotonic() - began < 0.05
        free.set()
    assert [event for event, _ in told] == ["disk-slow"]
    assert told[0][1]["waiting"] == 1


def test_a_full_disk_is_tried_again_until_it_takes_everything() -> None:
    told: list[str] = []
    done: list[str] = []
    with BackgroundWriter(lambda event, **details: told.append(event)) as writer:
        writer.submit(refusing(3, lambda: done.append("first")))
        writer.submit(lambda: done.append("second"))
    assert done == ["first", "second"]
    assert told == ["disk-refuses", "disk-back"]


def test_a_disk_that_stays_full_after_the_end_is_an_error_that_says_what_is_lost() -> None:
    with (
        pytest.raises(RunDirectoryError, match=r"2 results could not be written.*No space left"),
        BackgroundWriter(grace_seconds=0.05) as writer,
    ):
        writer.submit(refusing(10**9, lambda: None))
        writer.submit(refusing(10**9, lambda: None))


def test_another_error_is_raised_at_the_end_and_the_rest_is_written() -> None:
    done: list[int] = []

    def broken() -> None:
        raise ValueError("not a disk's fault")

    with pytest.raises(ValueError, match="not a disk's fault"), BackgroundWriter() as writer:
        writer.submit(broken)
        writer.submit(lambda: done.append(1))
    assert done == [1]


@pytest.mark.timeout(20)
def test_what_is_told_while_all_room_is_taken_is_written_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MOST_WAITING", 2)
    file = tmp_path / "lines"
    add = lambda text: lambda: file.open("a").write(f"{text}\n") and None  # noqa: E731
    room = threading.Event()

    def tell(event: str, **_: Any) -> None:
        writer.submit(add(event))

    writer = BackgroundWriter(tell)
    with writer:
        writer.submit(lambda: room.wait(10) and None)
        writer.submit(refusing(3, add("first")))
        writer.submit(add("second"))
        room.set()
        writer.submit(add("third"))
    assert [line for line in file.read_text().split() if not line.startswith("disk-slow")] == [
        "first", "disk-refuses", "disk-back", "second", "third",
    ]  # fmt: skip
