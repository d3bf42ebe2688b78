"""Access: hosts, other sites, and HTTP methods."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tda_export.errors import UsageError
from tda_export.runtime import Model
from tda_export.serve.access import Access, make_access, plain_host
from tests.serve.conftest import LOOPBACK_ALONE, PATIENCE, Served, serving
from tests.serve.test_errors import CHAT, COMPLETIONS, JSON, NAME, assert_error, http, post

SITE = "https://example.org"


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost", "localhost"),
        ("LocalHost.:8000", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("::1", "::1"),
        ("evil.example:8000", "evil.example"),
        ("localhost:8000:1", ""),
        ("localhost:x", ""),
        ("localhost@evil.example", "localhost@evil.example"),
        ("http://localhost", ""),
        ("a/b", ""),
        ("[::1", ""),
        ("", ""),
    ],
)
def test_plain_host(header: str, host: str) -> None:
    assert plain_host(header) == host


def access(**options: Any) -> Access:
    return make_access(**({"host": "127.0.0.1", "loopback": True, "allowed_hosts": (), "origins": ()} | options))


def test_names_by_which_the_server_may_be_called() -> None:
    own = {"localhost", "127.0.0.1", "::1"}
    assert access().hosts == own
    assert access(host="Machine.local").hosts == own | {"machine.local"}
    assert access(allowed_hosts=["a.example:443"]).hosts == own | {"a.example"}
    assert access(host="0.0.0.0", loopback=False).hosts is None
    assert access(host="10.0.0.1", loopback=False, allowed_hosts=["a.example"]).hosts == own | {"10.0.0.1", "a.example"}


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/page", "https://", "", "null", "https://a b"])
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(UsageError, match=r"is not an origin\. Give one like https://example\.org, or"):
        access(origins=[origin])


@pytest.mark.parametrize("host", ["", "http://a.example", "a/b"])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(UsageError, match="--allowed-host takes a name or an address, without a path"):
        access(allowed_hosts=[host])


def test_an_origin_in_any_spelling() -> None:
    assert access(origins=["HTTPS://Example.org/", "*", "http://localhost:3000"]).origins == (
        SITE,
        "*",
        "http://localhost:3000",
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_own_hosts(served: Served, host: str) -> None:
    assert http.get(f"{served.url}/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "a/b"])
def test_other_hosts(served: Served, host: str) -> None:
    """Refused on every path that a page of another site could read."""
    text = f"This server does not answer to the host name '{host}'. Start it with --allowed-host for that name."
    for path in ("/health", "/metrics", "/v1/models", "/nothing"):
        assert_error(http.get(served.url + path, headers={"Host": host}), 403, text, code="host_not_allowed")
    body = b'{"model": "tiny", "prompt": "Hi"}'
    answer = http.post(served.url + COMPLETIONS, content=body, headers=JSON | {"Host": host})
    assert_error(answer, 403, text, code="host_not_allowed")


def test_an_old_client_without_a_host(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_any_host_elsewhere(model: Model) -> None:
    with serving(model, access=Access(None, ())) as served:
        assert http.get(f"{served.url}/health", headers={"Host": "any.example"}).status_code == 200


PREFLIGHT = {
    "Origin": SITE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


def test_pages_of_other_sites_are_not_let_in(served: Served) -> None:
    answer = http.request("OPTIONS", served.url + CHAT, headers=PREFLIGHT)
    assert_error(answer, 405, "Not supported: OPTIONS", code="method_not_supported")
    answer = http.get(f"{served.url}/health", headers={"Origin": SITE})
    for given in (answer, http.get(f"{served.url}/nothing", headers={"Origin": SITE})):
        assert not [name for name in given.headers if name.startswith("access-control")]


@pytest.fixture(scope="module", params=[SITE, "*"])
def open_to(request: pytest.FixtureRequest, model: Model) -> Iterator[tuple[Served, str]]:
    with serving(model, access=Access(LOOPBACK_ALONE.hosts, (request.param,))) as running:
        yield running, request.param


def test_pages_that_may_ask(open_to: tuple[Served, str]) -> None:
    """They can read answers and errors."""
    served, origin = open_to
    answer = http.request("OPTIONS", served.url + CHAT, headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    for given in (
        http.get(f"{served.url}/v1/models", headers={"Origin": SITE}),
        http.post(served.url + COMPLETIONS, content=b"{", headers=JSON | {"Origin": SITE}),
        http.get(f"{served.url}/health", headers={"Origin": SITE, "Host": "evil.example"}),
    ):
        assert given.headers["access-control-allow-origin"] == origin


def test_pages_that_may_not_ask(model: Model) -> None:
    with serving(model, access=Access(LOOPBACK_ALONE.hosts, (SITE,))) as served:
        answer = http.request("OPTIONS", served.url + CHAT, headers=PREFLIGHT | {"Origin": "https://evil.example"})
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", f"/v1/models/{NAME}"])
def test_head_where_get_is(served: Served, path: str) -> None:
    head, get = http.head(served.url + path), http.get(served.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_elsewhere(served: Served) -> None:
    assert http.head(served.url + CHAT).status_code == 405
    assert http.head(f"{served.url}/nothing").status_code == 404


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_slashes_at_the_end(served: Served, slashes: str) -> None:
    for path in ("/health", "/v1/models", f"/v1/models/{NAME}"):
        assert http.get(served.url + path + slashes).json() == http.get(served.url + path).json()
    answer = post(served, COMPLETIONS + slashes, {"model": NAME, "prompt": "Hi", "max_tokens": 1})
    assert answer.status_code == 200
    assert_error(http.get(f"{served.url}/"), 404, "Unknown URL: GET /.", code="unknown_url")
