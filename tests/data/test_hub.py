"""Calls to the Hub: what is tried again, and when."""

import pytest
from huggingface_hub import errors as hub_errors
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.data.hub import is_transient, retry
from tests.support.http_errors import http_error


class Flaky:
    """Fails `times` times, then answers."""

    def __init__(self, times: int, error: Exception):
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "answer"


@given(failures=st.integers(0, 4), first=st.floats(0.1, 10))
def test_a_call_is_repeated_with_delays_that_double(failures, first):
    call, delays = Flaky(failures, ConnectionError("no")), []
    assert retry(call, attempts=5, first_delay=first, sleep=delays.append) == "answer"
    assert call.calls == failures + 1
    assert len(delays) == failures
    for count, delay in enumerate(delays):
        assert first * 2**count <= delay <= 1.5 * first * 2**count


def test_the_last_attempts_error_is_raised_as_it_is():
    error, delays = TimeoutError("slow"), []
    call = Flaky(9, error)
    with pytest.raises(TimeoutError) as caught:
        retry(call, attempts=3, sleep=delays.append)
    assert caught.value is error
    assert (call.calls, len(delays)) == (3, 2)


def test_delays_differ_between_processes_that_failed_together():
    delays = []
    for _ in range(8):
        retry(Flaky(1, ConnectionError("no")), sleep=delays.append)
    assert len(set(delays)) > 1


@pytest.mark.parametrize(("status", "passes"), [
    (408, True), (429, True), (500, True), (502, True), (503, True), (504, True),
    (400, False), (401, False), (403, False), (404, False), (410, False),
])  # fmt: skip
def test_only_a_busy_server_is_asked_again(status, passes):
    assert is_transient(http_error(hub_errors.HfHubHTTPError, status)) is passes


def test_a_lost_connection_of_the_hubs_own_client_is_transient():
    http = __import__(hub_errors.HTTPError.__module__.partition(".")[0])
    assert is_transient(http.ConnectError("[Errno -2] Name or service not known"))
    assert is_transient(http.ReadTimeout("slow"))


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), FileNotFoundError("x")])
def test_an_error_of_our_own_is_not_tried_again(error):
    call, delays = Flaky(1, error), []
    with pytest.raises(type(error)):
        retry(call, sleep=delays.append)
    assert (call.calls, delays) == (1, [])
