"""Judges in actors of their own: asked by replicas, killed, wrong."""

import json
import os
import signal
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray

from ray_abliterate.cluster.connection import live_nodes
from ray_abliterate.cluster.judge_actor import start_judges
from ray_abliterate.cluster.pool import ReplicaPool, _spec
from ray_abliterate.cluster.secrets import Secrets
from ray_abliterate.data.builtin.planted_model import planted_axes
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError, RecipeError
from ray_abliterate.evaluation.judges.classifier import ClassifierJudge
from ray_abliterate.evaluation.judges.judge import PrefetchingJudge
from ray_abliterate.recipe import Recipe, RefusalJudge
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from tests.support.classifiers import tiny_classifier

pytestmark = pytest.mark.ray

EXCHANGES = [("p", text) for text in ("I cannot help", "Sure here it is", "Sorry no", "yes")]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_classifier(tmp_path_factory.mktemp("classifier"), "answer", "refusal")


def settings(classifier: str | None, **more: Any) -> RefusalJudge:
    given = {"kind": "refusal-judge", "prompts": {"file": "behaviour.txt"}, "max_new_tokens": 4}
    own = {"classifier": classifier, "label": "refusal", "cache": False}
    return RefusalJudge.model_validate({**given, **own, **more})


def alive() -> list[int]:
    """The judges' processes."""
    actors = ray._private.state.actors().values()
    judges = [actor for actor in actors if actor["ActorClassName"] == "JudgeActor"]
    return [actor["Pid"] for actor in judges if actor["State"] == "ALIVE"]


def test_a_judge_elsewhere_judges_as_it_would_here_and_ends_with_its_block(
    classifier: str,
) -> None:
    with start_judges([settings(classifier)]) as bench:
        judge = bench.judges["refusal-judge"]
        assert isinstance(judge, PrefetchingJudge)
        here = ClassifierJudge(classifier, label="refusal")
        for exchange in EXCHANGES[:2]:
            judge.prefetch(exchange)
        assert judge.judge(EXCHANGES) == pytest.approx(here.judge(EXCHANGES), abs=1e-5)
        assert judge.judge([("p", " ")]) == [None]
        assert judge.identity == here.identity
        assert len(alive()) == 1
    deadline = time.monotonic() + 20
    while alive():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_what_a_judge_raises_is_raised_to_the_caller(tmp_path: Path) -> None:
    with start_judges([settings(str(tmp_path))]) as bench:
        for _ in range(2):
            with pytest.raises(ModelError, match="cannot be loaded"):
                bench.judges["refusal-judge"].judge(EXCHANGES)


def test_an_error_over_an_answer_of_a_lost_trial_is_not_raised_to_the_next(
    classifier: str, tmp_path: Path
) -> None:
    """A trial expects an answer, and is lost before it asks; the judge fails, and then works."""
    place = tmp_path / "classifier"
    with start_judges([settings(str(place))]) as bench:
        judge = bench.judges["refusal-judge"]
        judge.prefetch(EXCHANGES[0])
        assert ray.wait([judge._asked[EXCHANGES[0]]], timeout=60)[0]
        place.symlink_to(classifier)
        expected = ClassifierJudge(classifier, label="refusal").judge(EXCHANGES[:2])
        assert judge.judge(EXCHANGES[:2]) == pytest.approx(expected, abs=1e-5)
        known = judge._asked[EXCHANGES[0]]
        judge.prefetch(EXCHANGES[0])
        assert judge._asked[EXCHANGES[0]] is known, "what is known is not asked again"


class Echo(BaseHTTPRequestHandler):
    """Says REFUSAL, and keeps the key it was asked with."""

    keys: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Authorization"])
        body = json.dumps({"choices": [{"message": {"content": "REFUSAL"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_the_drivers_key_reaches_the_judge_and_only_the_judge(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes were started before the variable was set: they can't have inherited it."""
    key = "sk-of-the-judge-0123456789"
    monkeypatch.setenv("JUDGE_KEY", key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    asked = {"endpoint": url, "endpoint_model": "m", "key_variable": "JUDGE_KEY"}
    own = settings(None, label=None, **asked)
    try:
        with start_judges([own]) as bench:
            assert bench.judges["refusal-judge"].judge(EXCHANGES[:1]) == [1.0]
        assert Echo.keys == [f"Bearer {key}"]
        shown = repr(list(ray._private.state.actors().values()))
        assert "refusal-judge" in shown and key not in shown
    finally:
        server.shutdown()
        server.server_close()
    (secrets,) = [part for part in _spec(recipe.model, print).args if isinstance(part, Secrets)]
    assert "JUDGE_KEY" not in repr(secrets)


def test_a_judge_takes_its_part_of_a_card_and_more_than_there_is_is_refused(
    classifier: str, cluster: Any
) -> None:
    node = cluster.add_node(num_cpus=0, num_gpus=2)
    try:
        with (
            pytest.raises(RecipeError, match=r"scorers\.refusal-judge\.gpus = 3, but no node has"),
            start_judges([settings(classifier, gpus=3)]),
        ):
            pass
        judges = [settings(classifier, gpus=0.25), settings(classifier, name="other", gpus=1)]
        with start_judges(judges) as bench:
            left = bench.left(live_nodes())
        assert sorted(node.gpus for node in left) == [0, 0.75]
        assert sorted(node.gpus for node in live_nodes()) == [0, 2]
    finally:
        cluster.remove_node(node)


def test_replicas_score_with_one_judge_as_with_their_own_also_when_it_is_killed(
    classifier: str, recipe: Recipe, planted: Path, behaviour: PromptSet
) -> None:
    both = ClassifierJudge(classifier, label="refusal").judge([("", "sorry"), ("", "sure")])
    judged = settings(classifier, goal="minimize", threshold=sum(both) / 2)
    own = recipe.model_copy(update={"scorers": (judged,)})
    own = own.model_copy(update={"model": recipe.model.model_copy(update={"replicas": 2})})
    prompts = {judged.name: behaviour}
    setup = TrialSetup(Directions(planted_axes()[0].repeat(4, 1), "planted", {}))
    alone = Replica(own, str(planted), prompts)
    shape = alone.describe().shape
    plans = [Plan.nothing(), *(Plan.uniform(shape, 2.3, "none", s) for s in (0.5, 1.0))]
    expected = [alone.evaluate(plan, setup).scorecard for plan in plans]
    assert len({card["refusal-judge"].value for card in expected}) > 1
    with ExitStack() as stack:
        pool = stack.enter_context(ReplicaPool.start(own, str(planted), prompts))
        shared = pool.put(setup).argument
        assert pool.call(ReplicaApi.evaluate, plans[0], shared).scorecard == expected[0]
        (first,) = alive()
        os.kill(first, signal.SIGKILL)
        assert [
            pool.call(ReplicaApi.evaluate, plan, shared).scorecard for plan in plans
        ] == expected
        (again,) = alive()
        assert again != first
