"""What a reward is: a reward run, a sequence-classification checkpoint, a Python function, and a weighted list of them.

In come replies as token ids and as text; out comes a float per reply, NaN where a reward does not apply. `build.py` loads a job's
rewards and checks their lineage, `sources.py` and `retokenised.py` are the kinds, `scoring_model.py` loads one alone for
`rlhf-ray score`. It must not know who asks, nor what the scores are used for.
"""
