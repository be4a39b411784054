"""The three roles of PPO as plain classes: generator, scorer, learner; and how they work as Ray actors.

`generator.py` turns prompts into rollouts, `scorer.py` rollouts into rewards and reference log-probabilities, `learner.py`
evaluates, updates and publishes the adapter. `collector.py` has chunks sampled and scored on this rank, `actor_collector.py` by
actors, which `actor_pool.py` starts, watches and replaces. `experience.py` turns scores into advantages, `guards.py` and
`invariants.py` say when a run must stop. They must not know run folders, job files or the console's wording of a stage.
"""
