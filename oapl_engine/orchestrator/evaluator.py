"""Evaluator: held-out pass@k of the version that serves; carries out Evaluate."""

from oapl_engine.evaluation.evaluate import append_evaluation, evaluate, warn_of_scale
from oapl_engine.inference.protocol import Sampling
from oapl_engine.orchestrator.engine_events import EngineEvents
from oapl_engine.orchestrator.run import Run
from oapl_engine.rollout.session import EngineSession
from oapl_engine.samples import Prompt
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Handler


class Evaluator:
    """Evaluates with rank 0's engine; the other ranks wait."""

    def __init__(
        self,
        run: Run,
        session: EngineSession,
        events: EngineEvents,
        held_out: tuple[Prompt, ...],
        sampling: Sampling,
    ) -> None:
        self.run = run
        self.session = session
        self.events = events
        self.held_out = held_out
        self.sampling = sampling

    def handlers(self) -> dict[type, Handler]:
        return {e.Evaluate: self.evaluate}

    def evaluate(self, command: e.Evaluate) -> e.Event | None:
        """Append pass@k of the serving version to eval.jsonl and eval_problems.jsonl."""
        if self.run.ranks.rank:
            return None
        self.run.display.show_phase("evaluate", f"{len(self.held_out)} problems x {self.run.recipe.evaluation.n}")
        return self.events.run_or_interrupt(lambda: self._evaluate(command.step))

    def _evaluate(self, step: int) -> e.Event:
        run, settings = self.run, self.run.recipe.evaluation
        with run.stopwatch.measure("evaluate"):
            result = evaluate(
                self.session,
                self.held_out,
                settings.n,
                self.sampling,
                correct=settings.correct,
                max_invalid_share=run.recipe.reward.max_invalid_share,
                step=step,
                version=run.version,
                seed=run.recipe.run.seed,
            )
        append_evaluation(result, sorted({1, *settings.k}), run.directory)
        run.count_evaluation_tokens(self.session)
        run.display.say(f"pass@1 at step {step}: {result.describe()}")
        for line in warn_of_scale(result, settings.correct):
            run.display.say(line)
        return e.EvaluationDone(step)
