import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from axpo.options import JudgeConfig
from axpo.questions import Question
from axpo.rewards.critique import critic
from axpo.rewards.verify import verify

QUESTION = Question(
    "q", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}], (), "7"
)


def criticised(judge: JudgeConfig, text: str = "<answer>8</answer>") -> str:
    return critic(judge)(verify(text, QUESTION.answer), QUESTION)


@pytest.mark.parametrize(
    ("text", "critique"),
    [
        ("<answer>7</answer>", "Your answer '7' is right."),
        ("<answer>8</answer>", "Your answer '8' is wrong. Try again."),
        ("<answer></answer>", "You gave no answer. Try again."),
        ("<answer><think>7</answer>", "Your answer '<think>7' is wrong: it holds tags. Try again."),
    ],
)
def test_the_verifier_does_not_give_the_answer_away(text: str, critique: str) -> None:
    assert criticised(JudgeConfig(), text) == critique


class Judge(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None, dict[str, Any]]] = []  # noqa: RUF012
    reply: tuple[int, object] = (200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        status, answer = self.reply
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def judge() -> Iterator[JudgeConfig]:
    Judge.asked = []
    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield JudgeConfig(url=f"http://127.0.0.1:{server.server_port}/v1", model="wise", key="AXPO_TEST_KEY")
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_is_asked_and_told_the_right_answer(judge: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXPO_TEST_KEY", "secret")
    Judge.reply = 200, {"choices": [{"message": {"content": " Count again. \n"}}]}
    assert criticised(judge) == "Count again."
    ((path, key, body),) = Judge.asked
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "wise")
    prompt = body["messages"][0]["content"]
    for part in ("<image>How many?", "The right answer is: 7", "answered: 8"):
        assert part in prompt


@pytest.mark.parametrize(
    "reply",
    [
        (500, {}),
        (200, {"choices": []}),
        (200, {"error": "no"}),
        (200, "text"),
        (200, {"choices": [{"message": {"content": None}}]}),
        (200, {"choices": [{"message": {"content": " "}}]}),
    ],
)
def test_a_judge_that_says_nothing_is_asked_three_times_and_then_a_fault_of_the_system(
    judge: JudgeConfig, reply: tuple[int, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AXPO_TEST_KEY", "secret")
    monkeypatch.setattr("axpo.rewards.critique.RETRY_AFTER", (0.0, 0.0))
    Judge.reply = reply
    with pytest.raises(RuntimeError, match="the judge at http"):
        criticised(judge)
    assert len(Judge.asked) == 3
