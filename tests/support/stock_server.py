"""A stock vLLM server on loopback with our plugin, in a session of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil

from oapl_engine.weights.stock_server import opener_for

READY_SECONDS = 300


class ServerProcess:
    """`python -m vllm.entrypoints.openai.api_server` for a model folder, ready when the constructor returns."""

    def __init__(self, folder, log, max_model_len=128):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.open = opener_for(self.url).open
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--dtype", "float32"]
        command += ["--skip-tokenizer-init", "--enforce-eager", "--max-model-len", str(max_model_len)]
        command += ["--weight-transfer-config", '{"backend": "oapl"}', "--worker-extension-cls"]
        command += ["oapl_engine.weights.receiver.vllm_plugin.WeightReport", "--logprobs-mode", "processed_logprobs"]
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_PLUGINS": "oapl",
        }
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment, start_new_session=True, cwd=log.parent
            )
        self._wait(log)

    def _wait(self, log):
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(log.read_text(encoding="utf-8", errors="replace")[-3000:])
            with contextlib.suppress(OSError), self.open(self.url + "/health", timeout=2):
                return
            time.sleep(0.5)
        raise TimeoutError(log.read_text(encoding="utf-8", errors="replace")[-3000:])

    def greedy(self, prompts, new_tokens, timeout=120):
        """Greedy token ids of each prompt, or None where the server does not answer."""
        body = {
            "model": "m",
            "prompt": [[int(t) for t in p] for p in prompts],
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "detokenize": False,
        }
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self.open(request, timeout=timeout) as reply:
                return [choice["token_ids"] for choice in json.loads(reply.read())["choices"]]
        except urllib.error.HTTPError as refusal:
            refusal.read()
            return None
        except OSError:
            return None

    def version(self):
        with self.open(self.url + "/weight_info", timeout=10) as reply:
            return json.loads(reply.read())["weight_version"]

    def listeners(self):
        """Addresses that the server and its children listen on."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        found = [c for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return {c.laddr.ip for c in found}

    def close(self):
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, 10)
        for process in alive:
            process.kill()
        self.process.wait(20)
