"""One request to an evaluation server: bounded in time and size, and whoever does not answer is `Unavailable`."""

from __future__ import annotations

import http.client
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from reshard.errors import InputError
from reshard.evaluate.backend import Unavailable

_LIMIT_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said."""

    status: int
    document: Any
    """Its JSON; text where it is none."""

    @property
    def detail(self) -> str:
        """Why it refused, for people: FastAPI's `detail`, whose validation errors are a list."""
        said = self.document.get("detail", self.document) if isinstance(self.document, Mapping) else self.document
        if isinstance(said, list) and all(isinstance(part, Mapping) for part in said):
            said = "; ".join(f"{'.'.join(map(str, part.get('loc', ())))}: {part.get('msg')}" for part in said)
        return str(said)[:2000]


@dataclass(frozen=True, slots=True)
class Server:
    """Where an evaluation server is, and what opens it."""

    url: str
    token: str | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"server_url: {self.url!r} is no address", hint='server_url: "http://127.0.0.1:8000"')

    def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float = 20.0) -> Answer:
        """One request. Raises Unavailable where nobody answers in time, or nothing that is HTTP."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        data = None if body is None else json.dumps(body, default=_never).encode()
        try:
            connection.request(method, parts.path.rstrip("/") + path, data, self._headers(data is not None))
            response = connection.getresponse()
            said = response.read(_LIMIT_NBYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            what = f"no answer within {timeout_s:.0f} s" if isinstance(error, TimeoutError) else _worded(error)
            raise Unavailable(f"{method} {self.url}{path}: {what}", hint="is the server running there?") from error
        finally:
            connection.close()
        if len(said) > _LIMIT_NBYTES:
            raise Unavailable(f"{method} {self.url}{path}: an answer of more than {_LIMIT_NBYTES} bytes")
        return Answer(response.status, _decoded(said))

    def _headers(self, has_body: bool) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        if has_body:
            headers["Content-Type"] = "application/json"
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers


def server_at(url: str, token: str | None = None) -> Server:
    """The server at an address, which may have the token in it: `http://:TOKEN@host:8000`. Messages do not show it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return Server(url, token)
    host = parts.netloc.rpartition("@")[2]
    return Server(parts._replace(netloc=host).geturl(), token or parts.password)


def token_of(text: str | None) -> str | None:
    """A token as settings name it: `$NAME` is a variable of the environment."""
    if text is None or not text.startswith("$"):
        return text
    if text[1:] not in os.environ:
        raise InputError(f"server_token: the environment has no variable {text[1:]}")
    return os.environ[text[1:]]


def _never(value: object) -> Any:
    raise InputError(f"{value!r} cannot be sent as JSON")


def _decoded(said: bytes) -> Any:
    try:
        return json.loads(said, parse_constant=lambda name: {"NaN": math.nan}.get(name))
    except (ValueError, RecursionError):
        return said.decode(errors="replace")


def _worded(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
