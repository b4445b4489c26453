"""Judges: the rules, the model behind a server (a stub that this test starts), and why they are cross-checked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common.errors import UserError
from common.tasks.templates import get_template
from studies.judges import KEYWORDS, ModelJudge, Reflection, RuleJudge, keywords_in
from studies.openai_client import OpenAIClient
from studies.probing import verdicts
from studies.reflection import SelfReflection, accuracy_differences, examine
from studies.samplers import EndpointSampler, Response
from studies.second_thoughts import Behaviour, behaviour
from studies.training import Problem
from studies.verdict import Outcome

QUESTION = "Find the least k such that 3 divides 7k+2."
# Figure 11: what a keyword alone, and a judge alone, take for a reflection.
KEYWORD_FALSE_POSITIVE = (
    "Start with k = 1. Compute 7*1+2=9.\nIf 3 does not divide it, increase k and check again.\n\\boxed{1}"
)
JUDGE_FALSE_POSITIVE = (
    "The multiples of 7 are 7, 14, 21, 28, 35.\nOf these 21 fits, and 21-2=19.\n\\boxed{21}"
)
TRUE_REFLECTION = "7*1+2=10\nWait, let me recheck. 7*1+2=9\n\\boxed{1}"


class Stub(BaseHTTPRequestHandler):
    """Answers with what the test put into `server.replies`, and keeps what it was asked."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        status, payload = reply if isinstance(reply, tuple) else (200, self._wrapped(reply, body))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(payload.encode())

    def _wrapped(self, reply: str, body: dict) -> str:
        if self.path.endswith("chat/completions"):
            return json.dumps({"choices": [{"message": {"content": reply}}]})
        choice = {"text": reply, "finish_reason": "stop"}
        return json.dumps({"choices": [choice] * body["n"]})

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    found.asked, found.replies = [], ["1"]
    thread = threading.Thread(target=found.serve_forever, args=(0.02,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def client(server: ThreadingHTTPServer) -> OpenAIClient:
    return OpenAIClient(f"http://127.0.0.1:{server.server_port}", "m", patience=(0.01, 0.01))


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_keyword_is_found_in_any_case(keyword: str) -> None:
    assert keyword in keywords_in(f"so I {keyword.upper()} it")


def test_ambiguous_words_are_no_keywords() -> None:
    assert keywords_in("Wait, try again.") == []


@pytest.mark.parametrize(
    ("response", "answers"),
    [
        ("\n12+3=15\n\\boxed{15}", True),
        ("\n13+4=?\n5*6=?", False),
        ("\nAnn has 3 nuts, gets 4. Now?\n3+4=7", False),
        ("The answer is seven", True),
        ("", False),
        ("lalala", False),
    ],
)
def test_rules_tell_an_answer_from_a_continuation(response: str, answers: bool) -> None:
    assert RuleJudge().answers("12+3=?", response) is answers


@pytest.mark.parametrize(
    ("response", "category"),
    [
        (TRUE_REFLECTION, Reflection.REFLECTS),
        ("3+4=8\nLet me check again.\n3+4=7", Reflection.REFLECTS),
        ("3+4=8. Hmm, I made a mistake: 3+4=7", Reflection.REFLECTS),
        (KEYWORD_FALSE_POSITIVE, Reflection.NONE),
        (JUDGE_FALSE_POSITIVE, Reflection.NONE),
        ("def f():\n    return 7", Reflection.CODE),
        ("blue skies", Reflection.OFF_TOPIC),
    ],
)
def test_rules_see_a_reflection(response: str, category: Reflection) -> None:
    assert RuleJudge().reflects(QUESTION, response) is category


@pytest.mark.parametrize(
    ("reply", "answers", "category"),
    [
        ("1", True, Reflection.NONE),
        ("0 it goes on", False, Reflection.UNKNOWN),
        ("It checks its work.\n2", None, Reflection.REFLECTS),
        ("Category **3**.", None, Reflection.CODE),
        ("no idea", None, Reflection.UNKNOWN),
    ],
)
def test_judge_model_replies(server, reply: str, answers: bool | None, category: Reflection) -> None:
    server.replies = [reply]
    judge = ModelJudge(client(server))
    assert judge.answers("q {response}", "r") is answers
    assert judge.reflects("q", "r {question}") is category
    paths = {path for path, _ in server.asked}
    assert paths == {"/v1/chat/completions"}
    first, second = (body for _, body in server.asked)
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0, 100)
    assert second["max_tokens"] == 300
    assert "q {response}" in first["messages"][0]["content"]  # braces of a text stay what they are
    assert "r {question}" in second["messages"][0]["content"]


def test_an_overloaded_server_is_asked_again(server) -> None:
    server.replies = [(503, "busy"), "1"]
    assert ModelJudge(client(server)).answers("q", "r") is True
    assert len(server.asked) == 2


@pytest.mark.parametrize("reply", [(401, "no"), (200, "not json"), (200, '{"choices": []}'), (200, "{}")])
def test_a_server_that_cannot_judge_is_named(server, reply: tuple[int, str]) -> None:
    server.replies = [reply]
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    judge = ModelJudge(OpenAIClient(url, "m", setting="--judge", patience=(0.01,)))
    with pytest.raises(UserError, match=rf"^--judge: .*{server.server_port}"):
        judge.answers("q", "r")


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"^--endpoint: .*cannot be reached"):
        OpenAIClient("http://127.0.0.1:9", "m", patience=()).chat("hello", max_tokens=1)


def test_served_model_gets_the_raw_prompt_and_its_stop_string_back(server) -> None:
    template = get_template("r1")
    server.replies = ["1+1=2 </think> <answer>2"]
    found = EndpointSampler(client(server)).sample(
        ["1+1=?"], template, samples=3, temperature=0.5, max_tokens=9
    )
    path, body = server.asked[0]
    assert path == "/v1/completions"
    assert body["prompt"] == template.render("1+1=?")
    assert (body["n"], body["temperature"], body["stop"]) == (3, 0.5, ["</answer>"])
    problem = Problem("1+1=?", {"answer": "2"})
    assert verdicts([(response, problem) for response in found[0]], template, full=False) == ["correct"] * 3


@pytest.mark.parametrize("text", [KEYWORD_FALSE_POSITIVE, JUDGE_FALSE_POSITIVE])
def test_cross_check_rejects_what_one_detector_takes_for_a_reflection(server, text: str) -> None:
    """Figure 11: the keyword's false alarm (the judge disagrees), and the judge's (no keyword)."""
    keyword_alarm = bool(keywords_in(text))
    server.replies = ["1" if keyword_alarm else "It reconsiders.\n2"]
    row = examine(
        Response(text, 9, True), Problem(QUESTION, {"answer": "1"}), "wrong", ModelJudge(client(server))
    )
    assert row["keyword"] is keyword_alarm
    assert row["judged"] is not keyword_alarm
    assert row["cross"] is False


@pytest.mark.parametrize(
    ("response", "correct", "answered", "expected"),
    [
        ("3+4=7\nLet me recheck.\n3+4=7\n\\boxed{7}", True, True, Behaviour.CONFIRMS),
        ("3+4=8\nLet me recheck.\n3+4=7\n\\boxed{7}", True, True, Behaviour.CORRECTS),
        ("3+4=7\nLet me recheck.\n3+4=8\n\\boxed{8}", False, True, Behaviour.BREAKS),
        ("3+4=7\nLet me recheck. Let me recheck.", False, False, Behaviour.NO_ANSWER),
        ("3+4=8\nLet me recheck.\n3+4=9\n\\boxed{9}", False, True, Behaviour.STAYS_WRONG),
        ("3+4=7\n\\boxed{7}", True, True, None),
        ("Let me recheck.\n\\boxed{7}", True, True, None),
    ],
)
def test_four_behaviours(response: str, correct: bool, answered: bool, expected: Behaviour | None) -> None:
    assert behaviour(response, "7", correct=correct, answered=answered) is expected


def _rows(*, helps: bool, model: str = "qwen-math") -> list[dict]:
    return [
        {
            "model": model,
            "seed": seed,
            "temperature": temperature,
            "question": question,
            "keywords": ["recheck"] if cross else [],
            "keyword": cross,
            "judged": cross,
            "cross": cross,
            "correct": cross if helps else not cross,
            "behaviour": None,
            "text": None,
        }
        for seed in range(6)
        for temperature in (0.1, 1.0)
        for question in range(6)
        for cross in (True, False)
    ]


def test_claims_can_be_refuted() -> None:
    """Reflections that always help, and a control that reflects, refute the claims about them."""
    rows = [*_rows(helps=True), *_rows(helps=True, model="chat"), *_rows(helps=True, model="llama")]
    outcomes = [finding.outcome for finding in SelfReflection().judge(rows).findings]
    assert accuracy_differences(rows) == [1.0] * 6  # one for each question, however often it was sampled
    assert outcomes[0] is Outcome.CONFIRMED  # qwen-math reflects
    assert outcomes[2] is Outcome.NOT_CONFIRMED  # but so does the control
    assert outcomes[5] is Outcome.NOT_CONFIRMED  # and it helps
