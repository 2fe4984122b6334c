"""A stock server on this host is asked itself, whatever proxy the environment names."""

import contextlib
import http.server
import json
import threading

import pytest

from oapl_engine.weights import stock_server
from oapl_engine.weights.stock_server import StockServer, is_this_host


@contextlib.contextmanager
def listening():
    """An HTTP server on loopback; `asked` is what it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            server.asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = answer  # noqa: N815 (the name that http.server calls)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def proxy(monkeypatch):
    with listening() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        yield proxy


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_host_is_asked_itself(proxy, host):
    with listening() as server:
        StockServer(f"http://{host}:{server.server_port}").resume()
        assert (server.asked, proxy.asked) == (["/resume"], [])


def test_another_host_is_asked_through_the_proxy(proxy):
    StockServer("http://198.51.100.7:8000").resume()
    assert proxy.asked == ["http://198.51.100.7:8000/resume"]


@pytest.mark.parametrize(
    ("addresses", "here"),
    [
        (["127.0.1.1"], True),
        (["::1", "127.0.0.1"], True),
        (["fe80::1%eth0"], False),
        (["127.0.0.1", "10.0.0.1"], False),
    ],
)
def test_a_name_is_this_host_by_all_its_addresses(addresses, here, monkeypatch):
    found = [(0, 0, 0, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(stock_server.socket, "getaddrinfo", lambda *_: found)
    assert is_this_host("http://node7:8000") is here


def test_a_name_that_is_not_known_is_another_host(monkeypatch):
    def unknown(*_):
        raise stock_server.socket.gaierror("unknown")

    monkeypatch.setattr(stock_server.socket, "getaddrinfo", unknown)
    assert not is_this_host("http://node7:8000")
