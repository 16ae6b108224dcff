"""A judge behind an endpoint: requests, retries, and keys that are never shown."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.evaluation.judges import endpoint as endpoints
from ray_abliterate.evaluation.judges.endpoint import EndpointJudge

KEY = "sk-very-secret-0123456789"


class Server:
    """Replies as it is told, one reply after the other; the last again and again."""

    def __init__(self, *replies: object) -> None:
        self.replies, self.asked = list(replies), []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.asked.append((self.path, dict(self.headers), body))
                reply = owner.replies.pop(0) if len(owner.replies) > 1 else owner.replies[0]
                owner.send(self, reply)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def send(self, handler: BaseHTTPRequestHandler, reply: object) -> None:
        if reply == "slow":
            time.sleep(0.6)
            return
        if reply == "hang up":
            handler.connection.close()
            return
        status, headers, content = reply if isinstance(reply, tuple) else (200, {}, reply)
        if isinstance(content, str):
            content = {"choices": [{"message": {"content": content}}]}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


FAILED = (500, {}, b"")


@pytest.fixture
def served() -> Iterator[object]:
    servers: list[Server] = []

    def serve(*replies: object) -> Server:
        servers.append(Server(*replies))
        return servers[-1]

    yield serve
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def asked(server: Server, waits: list[float], **options: object) -> list[float | None]:
    judge = EndpointJudge(server.url, "judge-1", sleep=waits.append, **options)
    return judge.judge([("how do i boil an egg", "I cannot help.")])


@pytest.mark.parametrize(
    ("reply", "judgement"),
    [
        ("REFUSAL", 1.0), ("answer", 0.0), (" Answer.\n", 0.0), ("**REFUSAL**", 1.0),
        ("", None), ("REFUSAL or ANSWER", None), ("It is no refusal", None), ("yes", None),
    ],
)  # fmt: skip
def test_only_one_of_two_words_is_a_judgement(served, reply: str, judgement: object) -> None:
    assert asked(served(reply), []) == [judgement]


def test_the_request_is_a_chat_with_prompt_and_answer(served) -> None:
    server = served("ANSWER")
    asked(server, [])
    (path, headers, body), *rest = server.asked
    assert rest == []
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert "how do i boil an egg" in body["messages"][1]["content"]
    assert "I cannot help." in body["messages"][1]["content"]
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    "trouble",
    [
        FAILED,
        (503, {}, b"later"),
        (200, {}, b"<html>garbage"),
        (200, {}, {"choices": []}),
        (200, {}, []),
        "hang up",
        "slow",
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again_ever_later(served, trouble: object) -> None:
    waits: list[float] = []
    assert asked(served(trouble, trouble, "REFUSAL"), waits, timeout_seconds=0.2) == [1.0]
    assert len(waits) == 2
    assert 1.0 <= waits[0] <= 1.5
    assert 2.0 <= waits[1] <= 3.0


@pytest.mark.parametrize(
    ("after", "low", "high"),
    [("7", 7, 7), ("9999", 60, 60), ("soon", 1.0, 1.5), ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0)],
)
def test_a_server_says_when_to_come_back(served, after: str, low: float, high: float) -> None:
    waits: list[float] = []
    assert asked(served((429, {"Retry-After": after}, b""), "ANSWER"), waits) == [0.0]
    assert low <= waits[0] <= high


def test_a_server_that_stays_broken_is_an_error_and_no_score(served) -> None:
    waits: list[float] = []
    server = served(FAILED)
    with pytest.raises(ScoreError, match=r"failed 5 times \(status 500\)"):
        asked(server, waits)
    assert (len(server.asked), len(waits)) == (5, 4)


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (400, "Check `endpoint_model`"),
        (401, "Check the key in JUDGE_KEY."),
        (404, "it ends in /v1"),
        (302, "redirects, which is not followed"),
    ],
)
def test_a_refused_request_is_not_tried_again_and_nothing_shows_the_key(
    served, status: int, part: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("JUDGE_KEY", KEY)
    elsewhere = served("ANSWER")
    headers = {"Location": f"{elsewhere.url}/chat/completions"}
    server, waits = served((status, headers, f"wrong key {KEY}".encode())), []
    with caplog.at_level(logging.DEBUG), pytest.raises(RecipeError) as caught:
        asked(server, waits, key_variable="JUDGE_KEY")
    assert part in str(caught.value)
    assert waits == []
    assert server.asked[0][1]["Authorization"] == f"Bearer {KEY}"
    assert elsewhere.asked == []
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert KEY not in shown


def test_a_broken_server_never_shows_the_key(
    served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    trouble = (500, {"Retry-After": KEY}, KEY.encode())
    judge = EndpointJudge(served(trouble).url, "m", "JUDGE_KEY", sleep=lambda _: None)
    with caplog.at_level(logging.DEBUG), pytest.raises(ScoreError) as caught:
        judge.judge([("", "text")])
    assert "status 500" in caplog.text
    everything = [str(caught.value), caplog.text, judge.identity, repr(judge), repr(vars(judge))]
    assert not any(KEY in text for text in everything)


@pytest.mark.parametrize("value", ["", "  ", f"{KEY}\nx: y", f"{KEY} {KEY}", f"{KEY}é"])
def test_a_key_that_is_missing_or_no_key_is_told_without_it(
    served, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    server = served("ANSWER")
    with pytest.raises(RecipeError, match="JUDGE_KEY") as caught:
        asked(server, [], key_variable="JUDGE_KEY")
    assert KEY not in str(caught.value)
    assert server.asked == []


def test_no_server_is_an_error_after_as_many_attempts() -> None:
    waits: list[float] = []
    judge = EndpointJudge("http://127.0.0.1:9/v1", "m", sleep=waits.append)
    with pytest.raises(ScoreError, match=r"failed 5 times \(no connection \(Connection"):
        judge.judge([("", "text")])
    assert len(waits) == 4


def test_the_longest_wait_bounds_every_delay() -> None:
    assert endpoints._seconds("5") == 5.0
    assert endpoints._seconds(None) is None
    assert endpoints.LONGEST_DELAY_SECONDS == 60.0
