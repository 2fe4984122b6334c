"""WeightSync: publishes the policy to this rank's engine; carries out Publish."""

import json
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from oapl_engine.files import read_json, replace_text
from oapl_engine.inference.client import EngineLostError
from oapl_engine.inference.protocol import Sampling
from oapl_engine.orchestrator.engine_events import EngineEvents
from oapl_engine.orchestrator.run import Run
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Group, Prompt, make_rollout
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Handler
from oapl_engine.trainer.policy import Policy, published_weights
from oapl_engine.trainer.score import score
from oapl_engine.weights.attest import TOLERANCE, ProbePrompts, WeightMismatchError
from oapl_engine.weights.publish import Publisher
from oapl_engine.weights.transports import Buckets, make_buckets

PROBE_TOKENS = 128  # of a response: enough for every weight to matter; both sides score them at each publish


class WeightSync:
    """Packs, sends, checks and attests versions. What generation does meanwhile is the scheduler's Pause and Resume.

    run, session, policy, events:  what it works with
    sampling:                      how the probes' responses are drawn, of which they have at most PROBE_TOKENS tokens
    probe_token_ids:               prompts with one response each, whose log-probs attest that new weights are used
    probe_logprobs:                the trainer's, remembered while the policy was on its device
    """

    def __init__(
        self,
        run: Run,
        session: EngineSession,
        policy: Policy,
        events: EngineEvents,
        prompts: Sequence[Prompt],
        sampling: Sampling,
    ) -> None:
        self.run = run
        self.session = session
        self.policy = policy
        self.events = events
        self.sampling = sampling
        self.probe_token_ids = self._load_probes(prompts)
        self.probe_logprobs: list[NDArray[np.float32]] | None = None
        self.publisher = self._make_publisher()
        session.after_restart.append(self.publisher.engine_restarted)

    def handlers(self) -> dict[type, Handler]:
        return {e.Publish: self.publish, e.OffloadTrainer: self.remember_probes}

    def remember_probes(self, _: e.OffloadTrainer) -> None:
        """Stands before Learner's handler, which moves the policy off its device: a publish finds it on the host."""
        self.probe_logprobs = self._score_probes()

    def publish(self, command: e.Publish) -> e.Event | None:
        """Publish this rank's weights as `version`; PublishFailed where the engine or the attestation refuses it."""
        self.run.display.show_phase("publish", f"version {command.version}")
        return self.events.run_or_interrupt(lambda: self._publish(command.version))

    def close(self) -> None:
        self.publisher.close()

    def _publish(self, version: int) -> e.Event:
        run = self.run
        try:
            report = self.publisher.publish(version)
        except WeightMismatchError as error:
            run.display.say(f"version {version} was refused: {error}")
            return e.PublishFailed(version, error.parameter)
        run.stopwatch.add("publish", report.seconds["total"] - report.seconds["attest"])
        run.stopwatch.add("attest", report.seconds["attest"])
        run.journal.published(version, run.step, report.checksum, self.session.incarnation)
        with suppress(EngineLostError):
            run.count_engine_tokens(self.session)
        run.version = version
        run.publish_metrics = {"weights/changed_share": report.changed_share}
        if report.gap:
            run.publish_metrics |= {
                "logprob_gap/mean": report.gap.mean,
                "logprob_gap/max": report.gap.max,
                "mismatch_kl/all/mean": report.gap.k3,
            }
        return e.Published(version)

    def _make_publisher(self) -> Publisher:
        # The coarser of the two sides' roundings is the difference that must be tolerated.
        coarser = "bfloat16" if self.policy.matmul_dtype == torch.bfloat16 else self.session.engine.options.dtype
        probes = ProbePrompts(
            token_ids=self.probe_token_ids,
            trainer_logprobs=lambda _: self.probe_logprobs or self._score_probes(),
            tolerance=TOLERANCE[coarser],
        )
        return Publisher(
            lambda: published_weights(self.policy),
            self.session.control,
            bucket_bytes=self.run.recipe.weights.bucket_mb << 20,
            dtype=getattr(torch, self.session.engine.options.dtype),
            probes=probes,
            make_buckets=self._make_buckets,
        )

    def _make_buckets(self, size: int) -> Buckets:
        recipe = self.run.recipe
        folder = self.run.directory / "weights"
        return make_buckets(recipe.weights.transport, size, folder, recipe.rollout.tensor_parallel)

    def _load_probes(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the probes: prompts and a response of the start model to each; kept for resumes."""
        path = self.run.directory / f"probe{self.run.ranks.suffix}.json"
        if not path.exists():
            shorter = min(self.sampling.max_new_tokens, PROBE_TOKENS)
            groups = self.session.generate(prompts, 1, msgspec.structs.replace(self.sampling, max_new_tokens=shorter))
            responses = [group[0].ids().tolist() for group in groups]
            self.run.count_evaluation_tokens(self.session)
            pairs = zip(prompts, responses, strict=True)
            replace_text(path, json.dumps([[*prompt.token_ids.tolist(), *response] for prompt, response in pairs]))
        found: list[list[int]] = read_json(path)
        return found

    def _score_probes(self) -> list[NDArray[np.float32]]:
        """The trainer's log-probs [len - 1] of each probe at temperature 1."""
        train = self.run.recipe.train
        logprobs = score(
            self.policy,
            [_probe_group(number, token_ids) for number, token_ids in enumerate(self.probe_token_ids)],
            temperature=1.0,
            token_budget=train.token_budget,
            share_prompts=train.share_prompts,
        )
        return [logprobs[f"probe.{number}.0"] for number in range(len(self.probe_token_ids))]


def _probe_group(number: int, token_ids: Sequence[int]) -> Group:
    """A sequence as a group of one rollout, all of whose tokens but the first are scored."""
    prompt = Prompt(f"probe{number}", np.asarray(token_ids[:1], np.int32), "probe")
    name = f"probe.{number}"
    rollout = make_rollout(prompt, name, 0, token_ids[1:], spans=(), finish="stop", status="scored", reward=0.0)
    return Group(name, prompt, (rollout,), 0)
