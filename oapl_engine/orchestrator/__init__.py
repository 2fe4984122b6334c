"""Who carries out the scheduler's commands: the run, its learner, generator, weight synchronisation, evaluator."""
