"""EngineControl of a stock vLLM server that loaded our plugin (docs/weights.md says how to start one).

Its endpoints for updates exist with VLLM_SERVER_DEV_MODE=1 only, and must never listen beyond this host.
"""

import ipaddress
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.weights.control import (
    Attest,
    Bucket,
    Finish,
    Init,
    Inspect,
    Start,
    UpdateReply,
    UpdateRequest,
    to_fields,
)

# vLLM's own names; unlike our engine process, the server itself keeps requests over a pause.
PAUSE_MODES = {"drain": "wait", "abort": "abort", "keep": "keep"}


class StockServer:
    """The server at url (http://127.0.0.1:8000), without probe prompts.

    Raises OSError when the server is gone; a server whose trainer died in the middle of an update waits, paused, for
    the next publish.
    """

    def __init__(self, url: str, timeout_seconds: float = 600.0) -> None:
        self.url = url
        self.timeout_seconds = timeout_seconds
        self.version = -1
        self._opener = opener_for(url)

    def pause(self, mode: str) -> None:
        self._post(f"/pause?mode={PAUSE_MODES[mode]}")

    def resume(self) -> None:
        self._post("/resume")

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        raise NotImplementedError("a paused stock server does not score: publish to it without probe prompts")

    def update(self, request: UpdateRequest) -> UpdateReply:
        error = None
        try:
            self._carry_out(request)
        except urllib.error.HTTPError as refusal:
            error = refusal.read().decode()
        reports: list[dict[str, Any]] = []
        if isinstance(request, Inspect):
            reports = self._collective("parameter_checksums")
        elif error or isinstance(request, Finish):
            reports = self._collective("weight_report")
        return UpdateReply(version=self.version, error=error, reports=reports)

    def _carry_out(self, request: UpdateRequest) -> None:
        match request:
            case Init():
                self._post("/init_weight_transfer_engine", {"init_info": to_fields(request)})
            case Start(version):
                self.version = version
                self._collective("abandon_weight_update")
                self._post("/start_weight_update")
            case Bucket():
                self._post("/update_weights", {"update_info": to_fields(request)})
            case Finish():
                self._post("/finish_weight_update", {"weight_version": str(self.version)})
            case Attest() | Inspect():
                pass  # the server has no gate of its own

    def _collective(self, method: str) -> list[dict[str, Any]]:
        reply: dict[str, Any] = self._post("/collective_rpc", {"method": method})
        return reply["results"]  # type: ignore[no-any-return]

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        content = json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=self.timeout_seconds) as reply:
            return json.loads(reply.read() or b"null")


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """Opens URLs of a host: on this one without the proxy of the environment (http_proxy, no_proxy), which cannot reach
    it; elsewhere with it."""
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_this_host(url) else []))


def is_this_host(url: str) -> bool:
    """Whether every address of a URL's host is a loopback address; no for a name that is not known here."""
    try:
        found = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
