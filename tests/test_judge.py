"""The judge against a real HTTP server on this machine that can be told to fail in every way a server fails."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tandem.rewards.base import Reward, load_reward
from tandem.rewards.compose import Scores, score
from tandem.rewards.judge import DEFAULT_RUBRIC, Judge
from tandem.rewards.judge_cache import AnswerCache, cache_key
from tandem.rewards.judge_reply import DEFAULT_PATTERN, by_key, by_pattern, scaled
from tandem.rl.errors import UserError
from tandem.rl.samples import Completion, Group, Prompt

KEY = "sk-do-not-show-0123456789"
RUBRIC = "Rate: {{ completion }}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            self.server.attempts[text] += 1
            self.server.active += 1
            self.counted = True
            self.server.most_active = max(self.server.most_active, self.server.active)
            attempt = self.server.attempts[text]
        try:
            self.server.behave(self, text, attempt)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up
        finally:
            self.leave()

    def leave(self) -> None:
        """No longer active: said before an answer goes out, after which the client may send its next question."""
        with self.server.lock:
            self.server.active -= self.counted
            self.counted = False

    def reply(self, content: Any = "Score: 10", status: int = 200, **headers: str) -> None:
        message = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        self.send(json.dumps({**message, "usage": {"prompt_tokens": 100, "completion_tokens": 10}}), status, **headers)

    def send(self, body: str, status: int = 200, length: int | None = None, **headers: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.leave()
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.attempts: Counter[str] = Counter()
        self.active = self.most_active = 0
        self.behave: Callable[[Handler, str, int], None] = lambda handler, text, attempt: handler.reply()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def make(server: Server, **kwargs: Any) -> Reward:
    settings = {"base_url": server.url, "model": "m", "rubric": RUBRIC, "scale": [0, 10], "backoff": 0.01, "timeout": 5}
    return load_reward("judge", kwargs={**settings, **kwargs})


def ask(reward: Reward, *texts: str, timeout: float = 20.0, prompt: Any = "q", **columns: Any) -> Scores:
    completions = [Completion([ord(c) for c in text], [], False) for text in texts]
    groups = [Group(Prompt(0, [1], prompt, columns), completions)]
    return score(groups, [reward], lambda ids: "".join(map(chr, ids)), timeout=timeout, on_missing="group_mean")


def values(scores: Scores) -> list[float | None]:
    return [row.rewards["judge"] for row in scores.rows]


def test_scores_tokens_cost_and_latency(server: Server) -> None:
    def behave(handler: Handler, text: str, attempt: int) -> None:
        time.sleep(0.05)
        handler.reply(f"Fine.\nScore: {len(text) - len('Rate: ')}")

    server.behave = behave
    scores = ask(make(server, prompt_price=2.0, completion_price=10.0), "a", "bbb", "ccccc", "a")
    assert values(scores) == [0.1, 0.3, 0.5, 0.1]
    metrics = {k.removeprefix("rewards/judge/"): v for k, v in scores.metrics.items()}
    assert metrics["requests"] == 3  # equal questions are asked once
    assert metrics["retries"] == metrics["unanswered"] == metrics["unparsed"] == metrics["cached"] == 0
    assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (300, 30)
    assert metrics["cost"] == pytest.approx((300 * 2.0 + 30 * 10.0) / 1e6)
    assert 0.05 <= metrics["latency_mean"] <= metrics["latency_max"] < 5


def test_the_request_is_what_the_endpoint_expects(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    reward = make(
        server,
        system="You know {{ topic }}.",
        rubric="{{ prompt }} | {{ completion }} | {{ messages[0].role }}",
        api_key_env="MY_KEY",
        temperature=0.5,
        max_tokens=7,
        extra_body={"seed": 3},
    )
    assert values(ask(reward, "{{ prompt }}é\ud83d", prompt=[{"role": "user", "content": "q?"}], topic="sums")) == [1.0]
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m",
        "temperature": 0.5,
        "max_tokens": 7,
        "seed": 3,
        "messages": [
            {"role": "system", "content": "You know sums."},
            # What a completion says is a value and never a template.
            {"role": "user", "content": "q? | {{ prompt }}é\ud83d | user"},
        ],
    }


def test_without_a_variable_no_key_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(make(server), "a")
    assert "Authorization" not in server.seen[0][1]


FAULTS: dict[str, Callable[[Handler], Any]] = {
    "500": lambda h: h.send("oops", 500),
    "503": lambda h: h.send("busy", 503),
    "429": lambda h: h.send("{}", 429),
    "429 with Retry-After": lambda h: h.send("{}", 429, Retry_After="0.1"),
    "429 with a date": lambda h: h.send("{}", 429, Retry_After=formatdate(time.time() - 5, usegmt=True)),
    "429 with nonsense": lambda h: h.send("{}", 429, Retry_After="soon"),
    "truncated body": lambda h: h.send('{"choices": [{"mess', length=500),
    "no JSON": lambda h: h.send("<html>gateway</html>"),
    "a list": lambda h: h.send("[1]"),
    "no choices": lambda h: h.send('{"choices": []}'),
    "null choices": lambda h: h.send('{"choices": null}'),
    "nothing at all": lambda h: h.connection.shutdown(socket.SHUT_RDWR),
    "no HTTP": lambda h: h.wfile.write(b"220 smtp ready\r\n\r\n"),
    "hangs": lambda h: time.sleep(1.0),
    "hangs within the body": lambda h: [h.send('{"cho', length=500), time.sleep(1.0)],
    "deep JSON": lambda h: h.send("[" * 100_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_retried(server: Server, fault: str) -> None:
    server.behave = lambda handler, text, attempt: FAULTS[fault](handler) if attempt < 3 else handler.reply()
    scores = ask(make(server, timeout=0.3), "a")
    assert values(scores) == [1.0]
    assert server.attempts["Rate: a"] == 3
    assert scores.metrics["rewards/judge/retries"] == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_costs_one_row_only(server: Server, fault: str) -> None:
    server.behave = lambda handler, text, attempt: FAULTS[fault](handler) if "bad" in text else handler.reply()
    scores = ask(make(server, timeout=0.2, retries=1), "good", "bad", "good too")
    assert values(scores) == [1.0, None, 1.0]
    assert server.attempts["Rate: bad"] == 2
    assert scores.metrics["rewards/judge/unanswered"] == 1
    assert scores.metrics["rewards/missing"] == 1
    assert [row.reward for row in scores.rows] == [1.0, 1.0, 1.0]  # the missing one is the group's mean


def test_a_slow_drip_does_not_outlast_the_timeout(server: Server) -> None:
    """Every single byte comes in time; only a limit on the whole request ends this."""

    def behave(handler: Handler, text: str, attempt: int) -> None:
        if "bad" not in text:
            return handler.reply()
        handler.send("", length=1000)
        for _ in range(40):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    server.behave = behave
    started = time.monotonic()
    assert values(ask(make(server, timeout=0.3, retries=0), "good", "bad")) == [1.0, None]
    assert time.monotonic() - started < 1.5


def test_an_enormous_answer_is_not_read_to_its_end(server: Server) -> None:
    def behave(handler: Handler, text: str, attempt: int) -> None:
        if "bad" not in text:
            return handler.reply()
        handler.send("", length=2**34)
        for _ in range(20):
            handler.wfile.write(b" " * 2**20)

    server.behave = behave
    assert values(ask(make(server, retries=0), "good", "bad")) == [1.0, None]


def test_a_bad_request_is_not_repeated(server: Server) -> None:
    server.behave = lambda handler, text, attempt: (
        handler.send('{"error": "too long"}', 400) if "bad" in text else handler.reply()
    )
    assert values(ask(make(server), "good", "bad")) == [1.0, None]
    assert server.attempts["Rate: bad"] == 1


def test_retry_after_is_obeyed(server: Server) -> None:
    times: list[float] = []

    def behave(handler: Handler, text: str, attempt: int) -> None:
        times.append(time.monotonic())
        handler.send("{}", 429, Retry_After="0.5") if attempt == 1 else handler.reply()

    server.behave = behave
    assert values(ask(make(server), "a")) == [1.0]
    assert times[1] - times[0] >= 0.5


def test_waits_grow_with_jitter_and_leave_the_runs_random_streams_alone(server: Server) -> None:
    from tandem.rewards.judge_http import RequestFailed

    judge = make(server, backoff=1.0, max_backoff=4.0).function
    state = random.getstate()
    failure = RequestFailed("", retry=True)
    waits = [[judge._wait(attempt, failure) for _ in range(50)] for attempt in range(4)]
    for drawn, longest in zip(waits, (1.0, 2.0, 4.0, 4.0), strict=True):
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
        assert len(set(drawn)) == 50
    assert random.getstate() == state


def test_a_server_that_is_not_there_is_named(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="gave no score for any of 2 completions: ConnectionRefusedError") as caught:
        ask(make(server, base_url=url, retries=1), "a", "b")
    assert url in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_stops_at_once_and_shows_no_key(server: Server, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.behave = lambda handler, text, attempt: handler.send(f"no such key: {KEY}", status)
    with pytest.raises(UserError, match=f"refuses: HTTP {status}") as caught:
        ask(make(server, api_key_env="MY_KEY", max_connections=1), *"abcdefgh")
    assert KEY not in str(caught.value)
    assert len(server.seen) <= 2


def test_the_key_is_nowhere(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.behave = lambda handler, text, attempt: (
        handler.send(f"bad key {KEY}", 500) if "bad" in text else handler.reply("Score: 5")
    )
    reward = make(server, api_key_env="MY_KEY", retries=0)
    scores = ask(reward, "good", "bad")
    assert values(scores) == [0.5, None]
    judge = reward.function
    assert KEY not in repr(judge._endpoint) + repr(vars(judge))
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert files
    assert all(KEY not in path.read_text() for path in files)
    with pytest.raises(UserError) as caught:
        ask(reward, "bad")
    assert KEY not in str(caught.value)
    assert "[key]" in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base_url": "localhost:8000"}, "no http"),
        ({"base_url": "ftp://x"}, "no http"),
        ({"base_url": f"http://user:{KEY}@host/v1"}, "more than scheme"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "more than scheme"),
        ({"api_key_env": KEY}, "no name of an environment variable"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
        ({"api_key": KEY}, "did you mean 'api_key_env'"),
        ({"scale": [10, 0]}, "scale is"),
        ({"scale": 10}, "scale is"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"max_connections": "many"}, "max_connections is 'many'"),
        ({"score_pattern": "("}, "no regular expression"),
        ({"score_pattern": "abc"}, "no group"),
        ({"score_pattern": "(a)", "score_key": "b"}, "both given"),
        ({"rubric": "{% if %}"}, "no Jinja template"),
        ({"rubric": None, "rubric_file": "/nowhere.j2"}, "cannot read rubric_file"),
        ({"rubric_file": "x.j2"}, "both given"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_asked(
    server: Server, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        make(server, **kwargs)
    assert message in str(caught.value)
    assert KEY not in str(caught.value)
    assert not server.seen


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(UserError, match="needs 'model'"):
        load_reward("judge", kwargs={"base_url": "http://h/v1"})


def test_rubrics_are_sandboxed_and_their_faults_explained(server: Server) -> None:
    with pytest.raises(UserError, match="cannot be filled in") as caught:
        ask(make(server, rubric="{{ anwser }}"), "a", answer="4")
    assert "answer" in caught.value.reason
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ completion.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    ):
        with pytest.raises(UserError, match="cannot be filled in"):
            ask(make(server, rubric=attack), "a")
    assert not server.seen


def test_the_default_rubric_shows_question_reply_and_reference(server: Server) -> None:
    server.behave = lambda handler, text, attempt: handler.reply("Good.\n**Score:** 7")
    scores = ask(make(server, rubric=None, scale=None), "four", prompt="2+2?", answer="4")
    assert values(scores) == [0.7]
    sent = server.seen[0][2]["messages"][0]["content"]
    assert all(part in sent for part in ("2+2?", "four", "<reference_answer>\n4\n"))
    ask(make(server, rubric=None, scale=None), "four", prompt="2+2?")
    assert "reference_answer" not in server.seen[1][2]["messages"][0]["content"]
    assert by_pattern(DEFAULT_PATTERN)(DEFAULT_RUBRIC) is None  # a judge that repeats its orders gives no score


def test_a_conversation_is_shown_with_its_roles(server: Server) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}]
    ask(make(server, rubric="{{ prompt }} -> {{ completion }}"), "4", prompt=chat)
    ((_, _, body),) = server.seen
    assert body["messages"][-1]["content"] == "system: Be brief.\n\nuser: Two and two? -> 4"


def test_a_proxy_of_the_environment_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stands for the proxy: it gets the whole address, and the login that the variable holds."""
    monkeypatch.setenv("http_proxy", f"http://user:pass%20word@127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert values(ask(make(server, base_url="http://judge.invalid/v1"), "a")) == [1.0]
    ((path, headers, _),) = server.seen
    assert path == "http://judge.invalid:80/v1/chat/completions"
    assert headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"user:pass word").decode()
    assert headers["Host"].startswith("judge.invalid")
    assert values(ask(make(server, cache=False), "b")) == [1.0]
    assert server.seen[-1][0] == "/v1/chat/completions", "what no_proxy names is asked directly"


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_https_asks_only_servers_whose_certificate_is_trusted(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    url = f"https://localhost:{server.server_port}/v1"
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="certificate"):
        ask(make(server, base_url=url, retries=0), "a")
    assert server.seen == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert values(ask(make(server, base_url=url), "a")) == [1.0]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Score: 7", 7.0),
        ("score = 7.5 of 10", 7.5),
        ("Score: 2 … no. Final score: 8", 8.0),
        ("**Score: 9**", 9.0),
        ("The score is 6", 6.0),
        ('"score": 4', 4.0),
        ("Score: -1", -1.0),
        ("Underscore 3", None),
        ("excellent", None),
        ("", None),
        ("score:" * 20_000, None),
    ],
)
def test_scores_by_pattern(reply: str, expected: float | None) -> None:
    assert by_pattern(DEFAULT_PATTERN)(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score": 3}', 3.0),
        ('Thoughts {not json} then ```json\n{"why": "a {brace}", "score": "4.5"}\n```', 4.5),
        ('{"score": 1} and {"score": 2}', 2.0),
        ('{"score": 1} and {"other": 2}', 1.0),
        ('{"score": null}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e999}', None),
        ('{"score": [1]}', None),
        ("{" * 50_000, None),
        ('{"a":' * 5_000, None),
        ("none", None),
    ],
)
def test_scores_by_key(reply: str, expected: float | None) -> None:
    assert by_key("score")(reply) == expected


def test_nested_keys_and_scales() -> None:
    assert by_key("a.b")('{"a": {"b": 2}}') == 2.0
    assert by_key("a.b")('{"a": 2}') is None
    assert [scaled(v, (1.0, 5.0)) for v in (1, 3, 5, 6, 0, None)] == [0.0, 0.5, 1.0, None, None, None]
    assert scaled(17.0, None) == 17.0


def test_a_reply_without_a_score_is_no_reward_and_counted(server: Server) -> None:
    replies = {"Rate: a": "no idea", "Rate: b": None, "Rate: c": "Score: 11", "Rate: d": "Score: 5"}
    server.behave = lambda handler, text, attempt: handler.reply(replies[text])
    scores = ask(make(server), *"abcd")
    assert values(scores) == [None, None, None, 0.5]
    assert scores.metrics["rewards/judge/unparsed"] == 3
    with pytest.raises(UserError, match="gave no score for any of 1 completions"):
        ask(make(server), "a")


# The cache


def test_kept_answers_are_not_asked_for_again(server: Server) -> None:
    server.behave = lambda handler, text, attempt: handler.reply("Score: 5" if text.endswith("a") else "hm")
    first = ask(make(server), "a", "x")
    again = ask(make(server), "a", "x")
    assert values(first) == values(again) == [0.5, None]
    assert server.attempts == {"Rate: a": 1, "Rate: x": 2}  # a reply without a score is not kept
    assert again.metrics["rewards/judge/cached"] == 1
    for change in ({"model": "other"}, {"rubric": "Rate {{ completion }}"}, {"max_tokens": 9}, {"system": "s"}):
        before = len(server.seen)
        ask(make(server, **change), "a")
        assert len(server.seen) == before + 1, change
    before = len(server.seen)
    assert values(ask(make(server, scale=[0, 5]), "a")) == [1.0]  # read anew from the kept reply
    assert len(server.seen) == before
    ask(make(server, cache=False), "a")
    assert len(server.seen) == before + 1


def test_a_damaged_file_is_asked_for_again_and_a_full_disk_loses_nothing(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    ask(make(server, cache=str(folder)), "a")
    (file,) = folder.rglob("*.json")
    for damage in (b"", b'{"reply": "Sco', b"\xff\xfe", b"[]", b'{"reply": 3}'):
        file.write_bytes(damage)
        before = len(server.seen)
        assert values(ask(make(server, cache=str(folder)), "a")) == [1.0]
        assert len(server.seen) == before + 1
        assert json.loads(file.read_bytes())["reply"] == "Score: 10"
    blocked = tmp_path / "file"
    blocked.write_text("")
    scores = ask(make(server, cache=str(blocked)), "a")
    assert values(scores) == [1.0]
    assert scores.metrics["rewards/judge/cache_write_errors"] == 1


def _write_and_read(folder: str, seed: int, failures: Any) -> None:
    cache, draw = AnswerCache(Path(folder)), random.Random(seed)
    for _ in range(300):
        number = draw.randrange(5)
        key = cache_key({"n": number})
        if draw.random() < 0.5:
            cache.put(key, {"reply": str(number) * 5000})
        elif (kept := cache.get(key)) is not None and kept != {"reply": str(number) * 5000}:
            failures.put(number)


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    failures = context.Queue()
    workers = [context.Process(target=_write_and_read, args=(str(tmp_path), i, failures)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert failures.empty()
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(tmp_path.rglob("*.json"))) == 5


def test_keys_depend_on_content_not_on_order() -> None:
    assert cache_key({"a": 1, "b": "\ud83d"}) == cache_key({"b": "\ud83d", "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})


# Load


def test_connections_are_limited(server: Server) -> None:
    def behave(handler: Handler, text: str, attempt: int) -> None:
        time.sleep(0.05)
        handler.reply()

    server.behave = behave
    ask(make(server, max_connections=4), *(f"t{i}" for i in range(24)))
    assert server.most_active == 4


def test_what_is_unanswered_at_the_end_of_the_time_is_given_up_and_the_rest_kept(server: Server) -> None:
    def behave(handler: Handler, text: str, attempt: int) -> None:
        if "bad" in text:
            time.sleep(3.0)
        handler.reply()

    server.behave = behave
    started = time.monotonic()
    scores = ask(make(server, timeout=30), "good", "bad", "bad too", timeout=1.0)
    assert values(scores) == [1.0, None, None]
    assert time.monotonic() - started < 1.5


def test_a_thousand_calls_with_errors_and_hangs_lose_nothing(server: Server) -> None:
    """10% of the first attempts fail, 10% hang; two questions never work. Every row ends with its own right outcome."""
    draw = random.Random(0)
    kinds = {i: draw.choices(("ok", "error", "hang"), (0.8, 0.1, 0.1))[0] for i in range(1000)}

    def behave(handler: Handler, text: str, attempt: int) -> None:
        number = int(text.removeprefix("Rate: "))
        kind = kinds[number] if attempt == 1 else "ok"
        if number in (3, 500):
            handler.send("down", 503)
        elif kind == "error":
            draw.choice([FAULTS["500"], FAULTS["truncated body"], FAULTS["429"], FAULTS["no JSON"]])(handler)
        elif kind == "hang":
            time.sleep(1.0)
        else:
            handler.reply(f"Score: {number % 11}")

    server.behave = behave
    reward = make(server, timeout=0.4, retries=3, max_connections=32, cache=False)
    scores = ask(reward, *map(str, range(1000)), timeout=60)
    expected = [None if i in (3, 500) else i % 11 / 10 for i in range(1000)]
    assert values(scores) == expected
    faulty = sum(kind != "ok" for i, kind in kinds.items() if i not in (3, 500))
    assert scores.metrics["rewards/judge/unanswered"] == 2
    # Under load a good answer may come late and is asked for again; fewer retries than faults would be a lost one.
    assert scores.metrics["rewards/judge/retries"] >= faulty + 2 * 3


def test_an_instance_of_ones_own_is_a_reward_and_later_batches_count_anew(server: Server) -> None:
    judge = Judge(server.url, "m", rubric=RUBRIC, scale=(0, 10))
    reward = load_reward(judge, name="judge")
    assert reward.is_async
    assert ask(reward, "a").metrics["rewards/judge/requests"] == 1
    assert ask(reward, "b", "c").metrics["rewards/judge/requests"] == 2
