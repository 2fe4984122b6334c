"""The generating side of a run, opened: task, verifiers, engine, and the handlers that need them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from oapl_engine.data.task import load_task
from oapl_engine.orchestrator.engine_events import EngineEvents
from oapl_engine.orchestrator.evaluator import Evaluator
from oapl_engine.orchestrator.generator import Generator, context_length, report_dropped
from oapl_engine.orchestrator.run import Run
from oapl_engine.orchestrator.weight_sync import WeightSync
from oapl_engine.rollout.scorer import open_scorer
from oapl_engine.rollout.session import EngineSession, engine_cores, recipe_engine_options
from oapl_engine.scheduler.driver import Handler
from oapl_engine.trainer.policy import Policy


@contextmanager
def open_generation(run: Run, policy: Policy, events: EngineEvents) -> Iterator[list[dict[type, Handler]]]:
    """Handlers of Generator, WeightSync and Evaluator over one engine session; all of it is gone on exit."""
    recipe = run.recipe
    max_model_len = context_length(run, policy.model.config.get_text_config())
    data = replace(recipe.data, max_prompt_tokens=max_model_len - recipe.sampling.max_new_tokens)
    task = load_task(data, recipe.run.seed, policy.tokenizer)
    held_out = task.held_out
    if recipe.evaluation.task:
        other = replace(data, task=recipe.evaluation.task)
        held_out = load_task(other, recipe.run.seed, policy.tokenizer).held_out
    scorer = open_scorer(
        recipe.reward,
        task.source.verifier,
        task.source.verifier_options,
        policy.tokenizer,
        timed=lambda: run.stopwatch.measure("verify"),
    )
    incarnation = run.journal.incarnations()
    options = recipe_engine_options(
        recipe,
        run.model.path,
        max_model_len,
        cores=engine_cores(recipe),
        seed=recipe.run.seed + incarnation,
        incarnation=incarnation,
        version=-1,  # the weights of the model folder are not a version of this run until one is published
    )
    run.display.show_phase("start", "engine (vLLM)")
    with ExitStack() as stack:
        stack.callback(report_dropped, run, task, data.max_prompt_tokens)
        log_path = run.directory / f"engine{run.ranks.suffix}.log"
        session = stack.enter_context(EngineSession(options, log_path, scorer, events.fail, events.lost))
        probes = [task.prompt(position) for position in range(recipe.weights.probe_prompts)]
        weight_sync = WeightSync(run, session, policy, events, probes)
        stack.callback(weight_sync.close)
        session.after_restart.append(events.ready)  # last: weights can be published to the new process by now
        generator = Generator(run, session, events, task)
        evaluator = Evaluator(run, session, events, held_out)
        yield [generator.handlers(), weight_sync.handlers(), evaluator.handlers()]
