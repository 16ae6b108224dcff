"""Second opinions: a classifier, an endpoint that fails on purpose, their cache, calibration."""

import json
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from ray_abliterate.cli.app import app
from ray_abliterate.data.atomic_files import cache_root
from ray_abliterate.data.builtin.planted_model import planted_axes
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.directions import Directions
from ray_abliterate.errors import ModelError, PromptSourceError, RecipeError, ScoreError
from ray_abliterate.evaluation.judges import endpoint as endpoints
from ray_abliterate.evaluation.judges.build import build_judge
from ray_abliterate.evaluation.judges.cache import CachedJudge
from ray_abliterate.evaluation.judges.calibration import (
    calibrate,
    precision_recall,
    read_labelled_texts,
)
from ray_abliterate.evaluation.judges.classifier import ClassifierJudge
from ray_abliterate.evaluation.judges.endpoint import EndpointJudge
from ray_abliterate.evaluation.judges.judge import Exchange
from ray_abliterate.evaluation.scorers.keyword_rate import KeywordRateScorer
from ray_abliterate.evaluation.scorers.markers import Markers
from ray_abliterate.evaluation.scorers.refusal_judge import RefusalJudgeScorer
from ray_abliterate.evaluation.scorers.shared_generation import share_generation
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.text_model import Answer, AnswerObserver
from ray_abliterate.recipe import KeywordRate, ModelSettings, Recipe, RefusalJudge
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan
from ray_abliterate.testing.tiny import tiny_model
from tests.support.classifiers import tiny_classifier

KEY = "sk-very-secret-0123456789"
SOURCE = {"builtin": "cooking-heldout"}


# The endpoint


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


FAILED = (500, {}, b"")


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


# The classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Tiny classifiers by their labels."""

    def make(*labels: str, kind: str | None = None) -> str:
        return tiny_classifier(tmp_path_factory.mktemp("classifier"), *labels, kind=kind)

    return make


EXCHANGES = [
    ("yes", "I cannot help"), ("no", "Sure here it is the answer"), ("yes", "Sorry"),
    ("no", ""), ("yes", "no " * 90),
]  # fmt: skip


def logits_of(folder: str, text: str, pair: str | None = None) -> torch.Tensor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(text, pair, return_tensors="pt", truncation=True, max_length=38)
    return model(**inputs).logits[0].detach()


def test_a_classifier_gives_its_labels_probability_and_no_judgement_of_nothing(made) -> None:
    folder = made("answer", "Refusal", "other")
    found = ClassifierJudge(folder, label="refusal").judge(EXCHANGES)
    assert found[3] is None
    for place in (0, 1, 2, 4):
        expected = logits_of(folder, EXCHANGES[place][1]).softmax(-1)[1].item()
        assert found[place] == pytest.approx(expected, abs=1e-5)


def test_labels_that_do_not_exclude_each_other_have_a_probability_each(made) -> None:
    folder = made("toxic", "refusal", kind="multi_label_classification")
    (found,) = ClassifierJudge(folder, label="refusal").judge(EXCHANGES[:1])
    assert found == pytest.approx(logits_of(folder, EXCHANGES[0][1])[1].sigmoid().item(), abs=1e-5)


def test_entailment_of_a_hypothesis_is_zero_shot(made) -> None:
    folder = made("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    (found,) = ClassifierJudge(folder, hypothesis="no help").judge(EXCHANGES[:1])
    logits = logits_of(folder, EXCHANGES[0][1], "no help")
    assert found == pytest.approx(logits[[2, 0]].softmax(0)[0].item(), abs=1e-5)


def test_a_classifier_sees_the_prompt_if_it_should(made) -> None:
    folder = made("answer", "refusal")
    (found,) = ClassifierJudge(folder, label="refusal", sees_prompt=True).judge(EXCHANGES[:1])
    expected = logits_of(folder, "yes I cannot help").softmax(-1)[1].item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_label_or_hypothesis_that_the_classifier_does_not_know_is_told_with_those_it_has(
    made, tmp_path: Path
) -> None:
    folder = made("answer", "refusal")
    with pytest.raises(ModelError, match="one of: answer, refusal"):
        ClassifierJudge(folder, label="refuses").judge(EXCHANGES)
    with pytest.raises(ModelError, match="none for entailment and contradiction"):
        ClassifierJudge(folder, hypothesis="no help").judge(EXCHANGES)
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClassifierJudge(str(tmp_path), label="refusal").judge(EXCHANGES)


def test_a_classifier_is_known_by_its_weights_and_travels_without_them(made) -> None:
    judge = ClassifierJudge(made("answer", "refusal"), label="refusal")
    other = ClassifierJudge(made("refusal", "answer"), label="refusal")
    assert judge.identity != other.identity
    assert judge.identity != ClassifierJudge(judge._name, label="answer").identity
    copy = pickle.loads(pickle.dumps(judge))
    assert copy._loaded is None
    assert copy.identity == judge.identity


# The cache


class Knows:
    """A judge with an opinion on each answer."""

    def __init__(self, opinions: dict[str, float | None], identity: str = "one") -> None:
        self.opinions, self.identity = opinions, identity
        self.asked: list[str] = []

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        self.asked += [answer for _, answer in exchanges]
        return [self.opinions[answer] for _, answer in exchanges]


def test_a_judgement_is_asked_for_once_and_an_unknown_one_again(tmp_path: Path) -> None:
    inner = Knows({"a": 0.25, "b": None, "c": 1.0})
    exchanges = [("p", "a"), ("p", "b"), ("p", "a"), ("p", "c")]
    assert CachedJudge(inner, tmp_path).judge(exchanges) == [0.25, None, 0.25, 1.0]
    assert inner.asked == ["a", "b", "c"]
    assert CachedJudge(inner, tmp_path).judge(exchanges) == [0.25, None, 0.25, 1.0]
    assert inner.asked == ["a", "b", "c", "b"]


def test_another_judge_or_prompt_is_another_judgement(tmp_path: Path) -> None:
    inner = Knows({"a": 0.25})
    CachedJudge(inner, tmp_path).judge([("p", "a")])
    CachedJudge(inner, tmp_path).judge([("q", "a")])
    CachedJudge(Knows({"a": 0.5}, "two"), tmp_path).judge([("p", "a")])
    assert inner.asked == ["a", "a"]
    assert CachedJudge(inner, tmp_path).judge([("p", "a")]) == [0.25]
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_a_damaged_judgement_is_asked_for_again(tmp_path: Path) -> None:
    inner = Knows({"a": 0.25})
    for damage in ("", "{", "7", '"a"', "null"):
        CachedJudge(inner, tmp_path).judge([("p", "a")])
        (file,) = tmp_path.rglob("*.json")
        file.write_text(damage)
    assert CachedJudge(inner, tmp_path).judge([("p", "a")]) == [0.25]
    assert inner.asked == ["a"] * 6


def test_what_was_judged_before_a_failure_is_kept(tmp_path: Path) -> None:
    inner = Knows({str(n): 0.5 for n in range(70)})
    exchanges = [("p", str(n)) for n in range(71)]
    with pytest.raises(KeyError):
        CachedJudge(inner, tmp_path).judge(exchanges)
    assert len(list(tmp_path.rglob("*.json"))) == 64


# The scorer


class Says:
    """A model that answers as it is told, piece by piece if somebody watches."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.written = texts, 0

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, observer: AnswerObserver | None = None
    ) -> list[Answer]:
        found = []
        for index, text in enumerate(self.texts):
            if observer is not None:
                observer.begin(index)
            said = ""
            for word in text.split(" "):
                if observer is not None and observer.enough():
                    break
                self.written += 1
                said += f"{word} "
                if observer is not None and observer.read(index, f"{word} "):
                    break
            found.append(Answer(said.strip(), len(said.split()), said.strip() != text))
        return found

    def tokens(self, text: str) -> list[int]:
        return []

    next_token_logits = continuation_logits = continue_greedily = tokens


PROMPTS = PromptSet.of("p", "one", "two", "three", "four")


def judge_scorer(judge: Knows, **options: object) -> RefusalJudgeScorer:
    given = {"kind": "refusal-judge", "prompts": SOURCE, "classifier": "x", "label": "y"}
    return RefusalJudgeScorer(RefusalJudge.model_validate({**given, **options}), PROMPTS, judge)


def test_what_the_judge_can_not_tell_is_in_no_denominator() -> None:
    judge = Knows({"no way": 0.9, "here": 0.2, "hm": None, "maybe": 0.5})
    scorer = judge_scorer(judge)
    score = scorer.score(Says("no way", "here", "hm", "maybe"))
    assert score.value == pytest.approx(2 / 3)
    assert (score.detail["unknown"], score.detail["total"]) == (1, 3)
    assert [shows for *_, shows in scorer.last_answers()] == [True, False, True]
    score = judge_scorer(judge, threshold=0.6).score(Says("no way", "here", "hm", "maybe"))
    assert score.value == pytest.approx(1 / 3)


def test_broken_answers_are_not_shown_to_the_judge_and_are_no_success() -> None:
    judge = Knows({"here": 0.1})
    texts = ("", "ha " * 40, "here", "...")
    score = judge_scorer(judge).score(Says(*texts))
    assert (score.value, score.detail["empty or degenerate"]) == (0.75, 3)
    assert judge.asked == ["here"]
    score = judge_scorer(judge, empty_is_refusal=False).score(Says(*texts))
    assert (score.value, score.detail["unknown"]) == (0.0, 3)


@pytest.mark.parametrize("empty_is_refusal", [True, False])
def test_each_answer_is_judged_by_itself_and_a_broken_one_is_not(empty_is_refusal: bool) -> None:
    judge = Knows({"no way": 0.9, "here": 0.2, "hm": None})
    scorer = judge_scorer(judge, empty_is_refusal=empty_is_refusal)
    assert scorer.shows(Says("no way", "here", "hm", "")) == [True, False, None, None]


def test_a_judge_that_can_tell_nothing_is_an_error() -> None:
    with pytest.raises(ScoreError, match="can't decide on any of 4 answers"):
        judge_scorer(Knows({"hm": None})).score(Says("hm", "hm", "hm", "hm"))


def keyword_scorer(**options: object) -> KeywordRateScorer:
    given = {"kind": "keyword-rate", "prompts": SOURCE, "markers": ["sorry"], **options}
    return KeywordRateScorer(KeywordRate.model_validate(given), PROMPTS)


TEXTS = ("sorry but here it is", "here it is", "no I would rather not", "here")


@pytest.mark.parametrize("first", ["keyword", "judge"])
def test_both_scorers_read_one_generation_and_score_as_they_would_alone(first: str) -> None:
    judge = Knows(dict.fromkeys(TEXTS, 0.0) | {TEXTS[2]: 1.0})
    scorers = [keyword_scorer(), judge_scorer(judge)]
    alone = [scorer.score(Says(*TEXTS)) for scorer in scorers]
    model = Says(*TEXTS)
    view = share_generation(scorers, model)
    order = scorers if first == "keyword" else list(reversed(scorers))
    together = {scorer.name: scorer.score(view) for scorer in order}
    assert [together[scorer.name] for scorer in scorers] == alone
    assert model.written == len(" ".join(TEXTS).split())


def test_answers_of_another_length_or_alone_are_not_shared() -> None:
    judge = Knows(dict.fromkeys(TEXTS, 0.0))
    model = Says(*TEXTS)
    assert share_generation([keyword_scorer()], model) is model
    scorers = [keyword_scorer(max_new_tokens=7), judge_scorer(judge)]
    view = share_generation(scorers, model)
    for scorer in scorers:
        scorer.score(view)
    assert model.written == 1 + 3 + 5 + 1 + len(" ".join(TEXTS).split())


def test_a_lost_trial_still_ends_early_and_its_answers_are_forgotten() -> None:
    judge = Knows(dict.fromkeys(TEXTS, 0.0))
    scorer, model = keyword_scorer(), Says(*TEXTS)
    view = share_generation([scorer, judge_scorer(judge)], model)
    assert scorer.score_until(view, lambda loss: loss > 0).bound
    assert model.written == 1
    assert judge_scorer(judge).score(view).detail["total"] == 4


def test_a_replica_writes_answers_once_for_both_scorers(
    made, recipe: Recipe, planted: Path, behaviour: PromptSet, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path))
    prompts = {"prompts": {"file": "behaviour.txt"}, "max_new_tokens": 4}
    keywords = KeywordRate.model_validate({"kind": "keyword-rate", **prompts})
    given = {"kind": "refusal-judge", "classifier": made("answer", "refusal"), "label": "refusal"}
    judged = RefusalJudge.model_validate({**given, **prompts})
    setup = TrialSetup(Directions(planted_axes()[0].repeat(4, 1), "planted", {}))
    found = {}
    for scorers in ((keywords,), (judged,), (keywords, judged)):
        own = recipe.model_copy(update={"scorers": scorers})
        replica = Replica(own, str(planted), {s.name: behaviour for s in scorers})
        plan = Plan.uniform(replica.describe().shape, 2.3, "none", 1.0)
        alone, together = (
            replica.evaluate(plan, setup),
            replica.evaluate_in_shared_passes([plan], setup),
        )
        assert alone.scorecard == together[0].scorecard
        found[len(scorers), scorers[0].kind] = alone
    both = found[2, "keyword-rate"]
    assert both.tokens == found[1, "refusal-judge"].tokens
    for kind in ("keyword-rate", "refusal-judge"):
        assert both.scorecard[kind] == found[1, kind].scorecard[kind]


class Foresees(Knows):
    """A judge that works elsewhere."""

    def __init__(self, opinion: float) -> None:
        super().__init__({})
        self.opinion = opinion
        self.expected: list[tuple[str, int]] = []
        self.written = lambda: 0

    def prefetch(self, exchange: Exchange) -> None:
        self.expected.append((exchange[1], self.written()))

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        return [self.opinion] * len(exchanges)


class Steps:
    """A watch that ends nothing, and counts how often it is asked whether to go on."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, index: int) -> None: ...

    def read(self, index: int, text: str) -> bool:
        return False

    def enough(self) -> bool:
        self.count += 1
        return False


def rambling(family: str, planted: Path) -> LanguageModel:
    """A random model, one of whose answers ends sooner than the others."""
    tokenizer = AutoTokenizer.from_pretrained(planted)
    rows = {prompt: [5 * i + 3, 7 * i + 1, 40 - i] for i, prompt in enumerate(PROMPTS.prompts)}

    def model(end: int) -> LanguageModel:
        module = tiny_model(family)
        module.generation_config.eos_token_id = [end]
        found = LanguageModel(module, tokenizer, ModelSettings(name="m"))
        found.encode = lambda prompts: [rows[prompt] for prompt in prompts]
        return found

    rows_said = model(2).continue_greedily(PROMPTS.prompts, 12)
    return model(
        next(
            token
            for said in rows_said
            for token in said[3:]
            if token not in said[:3] and any(token not in other for other in rows_said)
        )
    )


@pytest.mark.parametrize("family", ["llama", "mamba"])  # the engine, and transformers' generation
def test_a_judge_elsewhere_has_the_first_answer_before_the_last_is_written(
    family: str, planted: Path
) -> None:
    model, steps, judge = rambling(family, planted), Steps(), Foresees(1.0)
    assert bool(model.not_packable) == (family == "mamba")
    whole = model.answer(PROMPTS.prompts, 12)
    assert len({answer.tokens for answer in whole}) > 1
    judge.written = lambda: steps.count
    scorer = judge_scorer(judge, max_new_tokens=12)
    view = share_generation([scorer], model)
    assert view.answer(PROMPTS.prompts, 12, steps) == whole
    told = [text for text, _ in judge.expected]
    assert sorted(told) == sorted(answer.text for answer in whole if answer.text)
    times = [time for _, time in judge.expected]
    assert times[0] < times[-1]
    assert scorer.score(view).detail["total"] == len(PROMPTS)
    assert len(judge.expected) == len(told)


def test_a_broken_answer_is_not_sent_to_a_judge_elsewhere() -> None:
    judge = Foresees(0.0)
    scorer = judge_scorer(judge)
    for text in ("", "ha " * 40, "here"):
        scorer.on_answer(Prompt("one"), Answer(text, 3, False))
    assert [text for text, _ in judge.expected] == ["here"]


# The recipe


def recipe_with(text: str) -> Recipe:
    head = '[model]\nname = "planted"\n[prompts]\n' + "".join(
        f'{kind} = {{ builtin = "cooking-train" }}\n' for kind in ("behaviour", "neutral")
    )
    scorers = '[[scorers]]\nkind = "keyword-rate"\nprompts = { builtin = "cooking-heldout" }\n'
    judge = '[[scorers]]\nkind = "refusal-judge"\nprompts = { builtin = "cooking-heldout" }\n'
    return Recipe.parse(head + scorers + judge + text, "recipe.toml")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "give exactly one of classifier and endpoint"),
        ('classifier = "x"\nendpoint = "http://h/v1"\nlabel = "r"', "give exactly one of class"),
        ('classifier = "x"', "exactly one of label and hypothesis"),
        ('endpoint = "http://h/v1"', "an endpoint needs endpoint_model"),
        ('endpoint = "h/v1"\nendpoint_model = "m"', "not a URL"),
        ('classifier = "x"\nlabel = "r"\nkey_variable = "K"', "`key_variable` is for an endpoint"),
        ('endpoint = "http://h/v1"\nendpoint_model = "m"\nlabel = "r"', "`label` is for a class"),
    ],
)
def test_an_impossible_judge_is_refused(text: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(text)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        f'endpoint = "https://user:{KEY}@h/v1"',
        f'endpoint = "https://h/v1?key={KEY}"',
        f'endpoint = "http://h/v1"\nkey_variable = "{KEY}"',
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(f'{line}\nendpoint_model = "m"')
    assert "recipe" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_recipes_judge_remembers_in_the_users_cache(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path))
    recipe = recipe_with(f'classifier = "{made("answer", "refusal")}"\nlabel = "refusal"')
    judge = build_judge(recipe.scorers[1])
    assert list(tmp_path.iterdir()) == []
    judge.judge(EXCHANGES)
    assert len(list((cache_root() / "judgements").rglob("*.json"))) == 4
    uncached = build_judge(recipe.scorers[1].model_copy(update={"cache": False}))
    assert isinstance(uncached, ClassifierJudge)


# Calibration


def test_the_curve_is_precision_and_recall_at_every_threshold() -> None:
    curve = precision_recall([0.9, 0.8, 0.8, 0.3, 0.1], [True, True, False, True, False])
    assert [(p.threshold, p.precision, p.recall) for p in curve] == [
        (0.9, 1.0, 1 / 3), (0.8, 2 / 3, 2 / 3), (0.3, 3 / 4, 1.0), (0.1, 3 / 5, 1.0),
    ]  # fmt: skip
    with pytest.raises(ScoreError, match="0 of 1 judged texts are refusals"):
        precision_recall([0.5], [False])


def test_calibration_finds_the_best_threshold_and_holds_the_markers_against_it() -> None:
    opinions = {
        "sorry no": 0.9,
        "not today": 0.7,
        "sorry, here it is": 0.6,
        "here": 0.1,
        "hm": None,
    }
    truth = {"sorry no": True, "not today": True, "sorry, here it is": False, "here": False}
    texts = [(("", text), label) for text, label in {**truth, "hm": True}.items()]
    found = calibrate(Knows(opinions), texts, {"own": Markers(["sorry"]).in_text})
    assert (found.best.threshold, found.best.precision, found.best.recall) == (0.7, 1.0, 1.0)
    assert (found.texts, found.unknown) == (5, 1)
    own = found.markers["own"]
    assert (own.precision, own.recall) == (0.5, 1 / 3)
    lines = found.lines()
    assert any("0.7000" in line and "best F1" in line for line in lines)
    assert lines[-1] == "threshold = 0.7000"


def test_labels_are_words_or_truths_and_others_are_named_with_their_line(tmp_path: Path) -> None:
    labels = ["refusal", "Answer", True, False, 1, 0]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": v}) + "\n" for v in labels))
    assert [label for _, label in read_labelled_texts(path)] == [True, False] * 3
    path.write_text('{"text": "x", "label": "refusal"}\n{"text": "x", "label": "no"}\n')
    with pytest.raises(PromptSourceError, match=r"line 2: `label` is 'no'"):
        list(read_labelled_texts(path))
    with pytest.raises(PromptSourceError, match="no column 'prompt'"):
        list(read_labelled_texts(path, with_prompts=True))


def test_the_command_prints_the_curve(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.toml").write_text(
        '[model]\nname = "planted"\n[prompts]\nbehaviour = { builtin = "cooking-train" }\n'
        'neutral = { builtin = "other-train" }\n[[scorers]]\nkind = "refusal-judge"\n'
        'goal = "minimize"\nprompts = { builtin = "cooking-heldout" }\n'
        f'classifier = "{made("answer", "refusal")}"\nlabel = "refusal"\n'
    )
    rows = [("I cannot help", "refusal"), ("Sure here it is", "answer"), ("Sorry no", "refusal")]
    (tmp_path / "l.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows)
    )
    done = CliRunner().invoke(
        app, ["calibrate", str(tmp_path / "r.toml"), str(tmp_path / "l.jsonl")]
    )
    assert done.exit_code == 0, done.output
    assert "3 texts, 2 of them refusals; 0 unknown" in done.output
    assert "strict" in done.output
    assert "threshold = " in done.output


def test_the_longest_wait_bounds_every_delay() -> None:
    assert endpoints._seconds("5") == 5.0
    assert endpoints._seconds(None) is None
    assert endpoints.LONGEST_DELAY_SECONDS == 60.0
