"""Control of a stock vLLM server that loaded our plugin (docs/weights.md says how to start one).

Its endpoints for updates exist with VLLM_SERVER_DEV_MODE=1 only, and must never listen beyond this host.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

PAUSE_MODES = {"drain": "wait", "abort": "abort", "keep": "keep"}


def stock_server_control(url: str, timeout_seconds: float = 600.0) -> Callable[[str, dict[str, Any]], Any]:
    """A Publisher's `control` for the server at url (http://127.0.0.1:8000), without golden prompts. Raises OSError
    when the server is gone; a server whose trainer died in mid-update waits, paused, for the next publish."""
    version = 0

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_seconds) as reply:
            return json.loads(reply.read() or b"null")

    def call(phase: str, payload: dict[str, Any]) -> None:
        nonlocal version
        if phase == "init":
            post("/init_weight_transfer_engine", {"init_info": payload})
        elif phase == "start":
            version = payload["version"]
            post("/collective_rpc", {"method": "abandon_weight_update"})
            post("/start_weight_update", {})
        elif phase == "bucket":
            post("/update_weights", {"update_info": payload})
        elif phase == "finish":
            post("/finish_weight_update", {"weight_version": str(version)})
        elif phase not in ("attest", "inspect"):
            raise ValueError(f"phase is {phase!r}; a stock server knows init, start, bucket, finish, attest, inspect")

    def control(phase: str, payload: dict[str, Any]) -> Any:
        if phase == "pause":
            return post(f"/pause?mode={PAUSE_MODES[payload['mode']]}", {})
        if phase == "resume":
            return post("/resume", {})
        error, reports = None, []
        try:
            call(phase, payload)
        except urllib.error.HTTPError as refusal:
            error = refusal.read().decode()
        if error or phase in ("finish", "inspect"):
            method = "parameter_checksums" if phase == "inspect" else "weight_report"
            reports = post("/collective_rpc", {"method": method})["results"]
        return {"error": error, "reports": reports}

    return control
