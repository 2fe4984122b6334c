"""The generating side of a run: what is asked, prepared before any weights are loaded; then engine and handlers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from oapl_engine.data.task import Task, load_task
from oapl_engine.inference.protocol import Sampling
from oapl_engine.orchestrator.engine_events import EngineEvents
from oapl_engine.orchestrator.evaluator import Evaluator
from oapl_engine.orchestrator.generator import Generator, context_length, report_dropped
from oapl_engine.orchestrator.run import Run
from oapl_engine.orchestrator.weight_sync import WeightSync
from oapl_engine.rollout.scorer import Scorer
from oapl_engine.rollout.session import EngineSession, engine_cores, recipe_engine_options
from oapl_engine.samples import Prompt
from oapl_engine.scheduler import events as e
from oapl_engine.scheduler.driver import Handler
from oapl_engine.text import describe_dialogue, end_token_ids
from oapl_engine.trainer.loading import load_tokenizer
from oapl_engine.trainer.policy import Policy


@dataclass(frozen=True)
class Questions:
    """What a run asks its engine.

    tokenizer, ends:  of the policy; token ids that end a response
    task:             prompts to train on
    held_out:         prompts to evaluate on
    context:          tokens of prompt and response together, at most
    """

    tokenizer: Any
    ends: tuple[int, ...]
    task: Task
    held_out: tuple[Prompt, ...]
    context: int


def prepare_questions(run: Run) -> Questions:
    """Read, render and split the problems; show one as the model sees it. Raises ConfigError."""
    recipe, model = run.recipe, run.model.path
    tokenizer = load_tokenizer(model)
    ends = end_token_ids(model, tokenizer, recipe.sampling.stop_token_ids)
    context = context_length(run)
    data = replace(recipe.data, max_prompt_tokens=context - recipe.sampling.max_new_tokens)
    task = load_task(data, recipe.run.seed, tokenizer)
    held_out = task.held_out
    if recipe.evaluation.task:
        held_out = load_task(replace(data, task=recipe.evaluation.task), recipe.run.seed, tokenizer).held_out
    for line in describe_dialogue(tokenizer, task.prompt(0).token_ids, ends):
        run.display.say(line)
    report_dropped(run, task, data.max_prompt_tokens)
    return Questions(tokenizer, ends, task, held_out, context)


@contextmanager
def open_generation(
    run: Run, questions: Questions, policy: Policy, events: EngineEvents
) -> Iterator[tuple[list[dict[type, Handler]], dict[type, Handler]]]:
    """Handlers of Generator, WeightSync and Evaluator over one engine session, which is gone on exit; and those that
    stand after the learner's."""
    recipe, task = run.recipe, questions.task
    scorer = Scorer(
        recipe.reward,
        task.source.verifier,
        task.source.verifier_options,
        questions.tokenizer,
        questions.ends,
        say=run.display.say,
        timed=lambda: run.stopwatch.measure("verify"),
    )
    incarnation = run.journal.incarnations()
    options = recipe_engine_options(
        recipe,
        run.model.path,
        questions.context,
        cores=engine_cores(recipe),
        seed=recipe.run.seed + incarnation,
        incarnation=incarnation,
        version=-1,  # the weights of the model folder are not a version of this run until one is published
    )
    run.display.show_phase("start", "engine (vLLM)")
    with ExitStack() as stack:
        if not task.source.finite:  # too long prompts of generated problems are met on the way
            stack.callback(report_dropped, run, task, questions.context - recipe.sampling.max_new_tokens)
        log_path = run.directory / f"engine{run.ranks.suffix}.log"
        session = stack.enter_context(EngineSession(options, log_path, scorer, events.fail, events.lost))
        probes = [task.prompt(position) for position in range(recipe.weights.probe_prompts)]
        sampling = Sampling.from_recipe(recipe.sampling, questions.ends)
        weight_sync = WeightSync(run, session, policy, events, probes, sampling)
        stack.callback(weight_sync.close)
        session.after_restart.append(events.ready)  # last: weights can be published to the new process by now
        generator = Generator(run, session, events, task, sampling)
        asked = Sampling.from_recipe(recipe.sampling, questions.ends, recipe.evaluation.temperature)
        evaluator = Evaluator(run, session, events, questions.held_out, asked)
        handlers = [generator.handlers(), weight_sync.handlers(), evaluator.handlers()]
        yield handlers, {e.OffloadTrainer: lambda _: session.allow_start()}
