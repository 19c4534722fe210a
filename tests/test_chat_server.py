"""The client against a server that fails in every way: retried, refused or one clear line, and the key never shown."""

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from peagle_train.answers.answers import Answer
from peagle_train.answers.chat_server import ChatServer, ServerError
from tests.chat_fake import MODEL, Reply, completion, serving

ASKED = [{"role": "user", "content": "a"}]
KEY = "sk-secret"


def client(url: str, **options: Any) -> ChatServer:
    settings: dict[str, Any] = {"sampling": {"temperature": 0.5}, "retry_wait": 0.0, "retries": 3, "timeout": 30.0}
    return ChatServer(url, MODEL, **{**settings, **options})


def in_turn(*replies: Reply) -> Callable[[dict[str, Any]], Reply]:
    """Each reply once, the last one from then on."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


FINE = completion("fine")


def test_a_request_has_the_conversation_the_settings_and_the_key() -> None:
    with serving(in_turn(completion("b", reasoning_content="hm", tokens=7))) as server:
        answer = client(server.url + "/", api_key=f" {KEY}\n").answer(ASKED, 5)
    assert answer == Answer("b", "stop", "hm", 7)
    [(headers, body)] = server.requests
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": MODEL, "messages": ASKED, "seed": 5, "stream": False, "temperature": 0.5}


def test_reasoning_is_read_under_its_new_name_and_tool_calls_are_told() -> None:
    replies = [completion("b", reasoning="hm"), completion(None, "stop", tool_calls=[{}]), completion(None, "length")]
    with serving(in_turn(*replies)) as server:
        answers = [client(server.url).answer(ASKED, 0) for _ in replies]
    assert answers[0].reasoning == "hm"
    assert answers[1].finish_reason == "tool_calls" and answers[1].content == ""
    assert answers[2] == Answer("", "length", None, 3)
    assert "Authorization" not in server.requests[0][0]


@pytest.mark.parametrize(
    "bad",
    [
        (429, b"{}"),
        (429, b"{}", {"Retry-After": "0"}),
        (429, b"{}", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        (500, b"oops"),
        (503, b"[]"),
        (200, b'{"choices": [{"mess'),
        (200, b"{}", {"Content-Length": "1000"}),  # hangs up in the middle of the body
        (200, b""),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": null, "finish_reason": "stop"}]}'),
        (200, b'{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}'),
        (200, b'{"choices": [{"message": {"content": "a"}, "finish_reason": null}]}'),
    ],
)
def test_what_may_pass_is_tried_again_as_often_as_allowed(bad: Reply) -> None:
    with serving(in_turn(bad, bad, bad, FINE)) as server:
        assert client(server.url).answer(ASKED, 0) == Answer("fine", tokens=3)
        assert len(server.requests) == 4
    with serving(in_turn(bad)) as server:
        with pytest.raises(ServerError, match="gave no answer in 3 tries; the last: ") as caught:
            client(server.url, retries=2).answer(ASKED, 0)
        assert len(server.requests) == 3
    assert "\n" not in str(caught.value)


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(in_turn(FINE)) as server:
        assert client(server.url).answer(ASKED, 0).content == "fine"


def test_a_connection_that_is_dropped_without_a_word_is_tried_again() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def hang_up_twice_then_answer() -> None:
        for turn in range(3):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                if turn == 2:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + FINE[1])

    thread = threading.Thread(target=hang_up_twice_then_answer, daemon=True)
    thread.start()
    with listener:
        answer = client(f"http://127.0.0.1:{listener.getsockname()[1]}").answer(ASKED, 0)
        thread.join()
    assert answer.content == "fine"


def test_a_stopped_client_does_not_wait_for_another_try() -> None:
    with serving(in_turn((500, b""))) as server:
        chat = client(server.url, retry_wait=3600.0)
        chat.stop()
        with pytest.raises(ServerError, match="in 1 tries"):
            chat.answer(ASKED, 0)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_turned_down_is_an_answer_and_is_not_tried_again(status: int) -> None:
    body = json.dumps({"object": "error", "message": "too\nlong"}).encode()
    with serving(in_turn((status, body))) as server:
        assert client(server.url).answer(ASKED, 0) == Answer("", "refused", detail=f"{status} too long")
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply, expected",
    [
        ((401, b'{"error": {"message": "bad key sk-secret"}}'), r"API key \(401 bad key \*\*\*\): see --api-key-env"),
        ((403, b'{"error": "sk-secret no"}'), r"API key \(403 \*\*\* no\)"),
        ((404, b'{"error": {"message": "no model tiny"}}'), r"not found \(404 no model tiny\): check --base-url"),
        ((405, b""), "answers 405 Method Not Allowed: check --base-url"),
        ((307, b"", {"Location": "http://127.0.0.1:1/"}), "answers 307"),
    ],
)
def test_a_mistake_that_every_request_shares_is_one_line_at_once(reply: Reply, expected: str) -> None:
    with serving(in_turn(reply)) as server:
        with pytest.raises(ValueError, match=expected) as caught:
            client(server.url, api_key=KEY).answer(ASKED, 0)
        assert len(server.requests) == 1
        server.models = reply
        with pytest.raises(ValueError, match=expected):
            client(server.url, api_key=KEY).check()
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_the_server_does_not_have_is_told_with_those_it_has() -> None:
    with serving() as server:
        client(server.url).check()
        with pytest.raises(ValueError, match="has no model 'huge'; it has tiny, other"):
            ChatServer(server.url, "huge", sampling={}).check()
        server.models = (200, b'{"data": 3}')
        with pytest.raises(ValueError, match="has no model 'tiny'; it has none"):
            client(server.url).check()
        with pytest.raises(ValueError, match=r"not found \(404 Not Found\)"):
            client(server.url + "/v2").check()


def test_a_server_that_is_not_there_is_one_line_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=f"no answer from http://127.0.0.1:{port}/v1/models: .*refused"):
        client(f"http://127.0.0.1:{port}", retries=100, retry_wait=3600.0).check()


@pytest.mark.parametrize(
    "url, expected",
    [
        ("127.0.0.1:8000", "is no URL of a server"),
        ("ftp://host/v1", "is no URL"),
        ("http://", "is no URL"),
        ("http://host:x/v1", "is no URL"),
        ("http://host/v1?key=1", "is no URL"),
        ("http://host/a b", "is no URL"),
        ("http://me:pw@host/v1", "holds a user name or a password"),
    ],
)
def test_urls_that_cannot_be_used_are_refused_without_showing_them(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        client(url)
    assert "pw" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    "url, expected",
    [
        ("http://host:1", "http://host:1/v1"),
        ("http://host:1/", "http://host:1/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("http://host/api/v3/chat/completions", "http://host/api/v3"),
    ],
)
def test_a_url_may_lack_its_v1_or_name_the_whole_endpoint(url: str, expected: str) -> None:
    assert client(url).base_url == expected


@pytest.mark.parametrize("key", ["a\nb", "\u00e9"])
def test_a_key_that_no_header_can_have_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="holds characters that no HTTP header can have"):
        client("http://host", api_key=key)
