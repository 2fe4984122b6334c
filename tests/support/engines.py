"""Engines without vLLM: the real receiver behind the state machine of the engine process, as an EngineControl."""

import json
import subprocess
import sys

import msgspec
import torch

from oapl_engine.weights.control import Attest, Bucket, Finish, Init, Inspect, Start, UpdateReply
from oapl_engine.weights.receiver.plan import PlanError
from oapl_engine.weights.receiver.update import InPlaceUpdate
from tests.conftest import PROGRAMS


def phase_of(request):
    """Name of a request's type, in lower case."""
    return type(request).__name__.lower()


def carry_out(update, request):
    """What InPlaceUpdate does for a request."""
    match request:
        case Init(manifest, layout, buffers):
            update.init(manifest, layout, buffers)
        case Start():
            update.start()
        case Bucket(bucket, length, checksums):
            update.receive(bucket, length, checksums)
        case Finish():
            update.finish()


class ReceiverEngine:
    """In this process. before: name of a call to what happens first; answers: log-probs instead of the model's."""

    def __init__(self, model):
        self.receiver = InPlaceUpdate(model)
        self.serving, self.phases, self.answers, self.before = True, [], None, {}

    def _first(self, phase, request=None):
        self.phases.append(phase)
        self.before.get(phase, lambda r: None)(request)

    def pause(self, mode):
        self._first("pause")
        self.serving = False

    def resume(self):
        self._first("resume")
        self.serving = True

    def score(self, token_ids):
        self._first("score")
        return bigram_logprobs(self.receiver.model, token_ids) if self.answers is None else self.answers

    def update(self, request):
        self._first(phase_of(request), request)
        error = None
        try:
            carry_out(self.receiver, request)
        except PlanError as refusal:
            error = str(refusal)
        return UpdateReply(error=error, reports=[self.receiver.report()])


class ReceiverProcesses:
    """Ranks of an engine, a process each (programs/receiver_process.py). before: as in ReceiverEngine."""

    def __init__(self, ranks=1, environment=None):
        command = [sys.executable, str(PROGRAMS / "receiver_process.py")]
        self.ranks = [
            subprocess.Popen(
                [*command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment
            )
            for rank in range(ranks)
        ]
        self.before = {}

    def pause(self, mode):
        self.before.get("pause", lambda r: None)(None)

    def resume(self):
        self.before.get("resume", lambda r: None)(None)

    def score(self, token_ids):
        raise NotImplementedError

    def update(self, request):
        self.before.get(phase_of(request), lambda r: None)(request)
        if isinstance(request, Attest):
            return UpdateReply()
        replies = [msgspec.convert(reply, UpdateReply) for reply in self._ask(msgspec.to_builtins(request))]
        errors = [reply.error for reply in replies if reply.error]
        reports = [report for reply in replies for report in reply.reports]
        return UpdateReply(error=errors[0] if errors else None, reports=reports)

    def parameters(self):
        """Live bytes by name, one dict per rank."""
        return [reports for reply in self._ask(msgspec.to_builtins(Inspect())) for reports in reply["reports"]]

    def close(self):
        for rank in self.ranks:
            rank.kill()
            rank.communicate()

    def _ask(self, row):
        for rank in self.ranks:
            print(json.dumps(row), file=rank.stdin, flush=True)
        replies = [rank.stdout.readline() for rank in self.ranks]
        if not all(replies):
            raise ConnectionError("the receiver is dead")
        return [json.loads(reply) for reply in replies]


def bigram_logprobs(model, token_ids):
    """Of a bigram model made of a FusedModel: enough for weights to matter."""
    hidden = model.embed[token_ids[:-1]] @ model.down.t() + model.norm
    scores = (hidden @ model.qkv[: len(model.norm)].t() @ model.embed[:10].t()).log_softmax(-1)
    return scores[range(len(token_ids) - 1), token_ids[1:]].detach().numpy()


def assert_identical(model, trainer, fused_model):
    """The engine's model holds what a freshly loaded one would."""
    fresh = fused_model(model.norm.dtype)
    fresh.load_weights((name, tensor.to(model.norm.dtype)) for name, tensor in trainer.items())
    for (name, live), expected in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(live, expected), name
