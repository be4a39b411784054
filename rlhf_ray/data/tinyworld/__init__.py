"""The bundled task: a small world of instructions with a rule that scores any reply, and a base model trained on its text.

It proves the plumbing and the learning, offline, on any machine; it is no benchmark of language. Because the rule is known, the
*true* reward of a policy can be told apart from what a learned reward model says of it.
"""

from rlhf_ray.data.tinyworld.base import build_base
from rlhf_ray.data.tinyworld.judge import score, true_reward
from rlhf_ray.data.tinyworld.rows import preference_rows, prompt_rows, sft_rows
from rlhf_ray.data.tinyworld.text import pretraining_text
from rlhf_ray.data.tinyworld.world import Sizes, write_world

__all__ = [
    "Sizes",
    "build_base",
    "preference_rows",
    "pretraining_text",
    "prompt_rows",
    "score",
    "sft_rows",
    "true_reward",
    "write_world",
]
