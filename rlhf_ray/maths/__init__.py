"""The equations of RLHF in pure torch: no I/O, no state of a run, nothing of ours above this floor.

masks, logprobs, kl, controllers, returns, losses, stats, standard_errors, comparisons, intervals, schedules, rng: one equation per
function, each with its source.
"""
