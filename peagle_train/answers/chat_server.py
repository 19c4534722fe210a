"""A client of servers that speak OpenAI's chat completions (vLLM, SGLang), on the standard library alone."""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from peagle_train.answers.answers import Answer
from peagle_train.answers.prompts import Message
from peagle_train.errors import one_line

RETRIED = (408, 425, 429)
"""Statuses that are worth another try, besides 5xx."""
REFUSED = (400, 413, 422)
"""Statuses by which a server turns down one request, mostly because its prompt is too long."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, and for the list of models, at most."""


class ServerError(RuntimeError):
    """The server did not answer, however often it was asked. One line."""


class _Refused(Exception):
    """The server turns down this request."""


class _Unanswered(Exception):
    """No usable answer this time; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ChatServer:
    """Answers from `BASE/chat/completions`. Safe to call from many threads.

    Args:
        base_url: http or https, mostly ending in /v1 (which is added where there is no path).
        model: as the server calls it.
        sampling: further fields of a request: temperature, top_p, max_tokens, chat_template_kwargs.
        api_key: sent as a bearer token; never printed.
        timeout: seconds without a byte after which a request counts as lost.
        retries: further tries of a request after 408, 425, 429, 5xx, a lost connection or a body that is no answer.
        retry_wait: seconds before the first of them; doubles with each, up to 60. A Retry-After header (seconds) counts
            instead where it is longer.

    Raises:
        ValueError: the URL or the key cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        sampling: Mapping[str, Any],
        api_key: str | None = None,
        timeout: float = 3600.0,
        retries: int = 6,
        retry_wait: float = 1.0,
    ) -> None:
        self.base_url, self.model, self.sampling = _checked_url(base_url), model, dict(sampling)
        self.timeout, self.retries, self.retry_wait = timeout, retries, retry_wait
        self._key = (api_key or "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError("the API key holds characters that no HTTP header can have")
        handlers: list[Any] = [_NoRedirects]
        if urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy of the environment does not know this machine
        self._open = urllib.request.build_opener(*handlers).open
        self._stopped = threading.Event()

    def check(self) -> None:
        """ValueError unless the server is there and has the model. A server that cannot be reached fails at once."""
        try:
            answer = self._try("/models", None, min(self.timeout, LONGEST_WAIT))
        except _Refused as error:
            raise ValueError(f"{self.base_url}/models is turned down: {error}") from None
        except _Unanswered as error:
            raise ValueError(
                f"no answer from {self.base_url}/models: {error}; is the server up, the URL right?"
            ) from None
        listed = answer.get("data")
        models = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        if self.model not in models:
            names = ", ".join(map(str, models[:5])) or "none"
            raise ValueError(f"{self.base_url} has no model {self.model!a}; it has {names}")

    def stop(self) -> None:
        """Let threads that wait for another try give up."""
        self._stopped.set()

    def answer(self, messages: Sequence[Message], seed: int) -> Answer:
        """The model's next turn.

        Raises:
            ServerError: no answer after all retries.
            ValueError: a mistake that every further request would share (key, URL, model).
        """
        body = {"model": self.model, "messages": list(messages), "seed": seed, "stream": False, **self.sampling}
        for attempt in range(self.retries + 1):
            try:
                return _read_answer(self._try("/chat/completions", body, self.timeout))
            except _Refused as error:
                return Answer("", "refused", detail=str(error))
            except _Unanswered as error:
                reason = str(error)
                wait = min(LONGEST_WAIT, max(self.retry_wait * 2**attempt, error.wait or 0.0))
                if attempt == self.retries or self._stopped.wait(wait):
                    break
        raise ServerError(f"{self.base_url} gave no answer in {attempt + 1} tries; the last: {reason}")

    def _try(self, path: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """One request; its answer as an object."""
        url = self.base_url + path
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._open(urllib.request.Request(url, data, headers), timeout=timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise self._failure(error, url) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Unanswered(self._clean(getattr(error, "reason", None) or error)) from None
        except (ValueError, RecursionError):
            raise _Unanswered("a body that is not valid JSON") from None
        if not isinstance(answer, dict):
            raise _Unanswered("a body that is no JSON object")
        return answer

    def _failure(self, error: urllib.error.HTTPError, url: str) -> Exception:
        try:
            text = error.read(20_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        said = f"{error.code} {self._clean(_server_message(text) or error.reason)}"
        if error.code in RETRIED or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            return _Unanswered(said, float(after) if after.isascii() and after.isdigit() else None)
        if error.code in REFUSED:
            return _Refused(said)
        if error.code in (401, 403):
            return ValueError(f"{url} does not accept the API key ({said}): see --api-key-env")
        if error.code == 404:
            return ValueError(f"{url} is not found ({said}): check --base-url (mostly http://HOST:PORT/v1) and --model")
        return ValueError(f"{url} answers {said}: check --base-url (mostly http://HOST:PORT/v1)")

    def _clean(self, text: Any) -> str:
        """One short line without the key, which some servers repeat."""
        line = one_line(text) or type(text).__name__
        return (line.replace(self._key, "***") if self._key else line)[:300]


def _checked_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or not base_url.strip().isascii() or " " in base_url.strip():
        raise ValueError("--base-url is no URL of a server; give one like http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("--base-url holds a user name or a password: give the key through --api-key-env instead")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _server_message(text: str) -> str:
    """What an error's body says: {"error": {"message"}} (OpenAI, vLLM), {"message"} or {"detail"} (SGLang, proxies)."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or ""
    return inner if isinstance(inner, str) else ""


def _read_answer(body: dict[str, Any]) -> Answer:
    try:
        choice = body["choices"][0]
        message, finish_reason = choice["message"], choice["finish_reason"]
        content = message.get("content") or ""
        # vLLM renamed the field; older ones and SGLang say reasoning_content.
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        tokens = (body.get("usage") or {}).get("completion_tokens") or 0
        if message.get("tool_calls"):
            finish_reason = "tool_calls"
        if not (isinstance(content, str) and isinstance(finish_reason, str) and isinstance(tokens, int)):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Unanswered("a body that is no chat completion") from None
    return Answer(content, finish_reason, reasoning if isinstance(reasoning, str) else None, tokens)
