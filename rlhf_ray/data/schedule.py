"""Which rows a PPO step uses: a function of (seed, step), so that the data cursor of a run is its step number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from rlhf_ray.errors import DataError
from rlhf_ray.maths.rng import derived_seed, permutation, uniforms

T = TypeVar("T")


class Passes(Generic[T]):
    """`rows` over and over, each pass in an order of its own."""

    def __init__(self, rows: Sequence[T], seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._order_of, self._order = -1, [0]

    def at(self, position: int) -> T:
        """The row at a place of this endless list, counted from 0."""
        number, place = divmod(position, len(self.rows))
        if self._order_of != number:
            self._order_of, self._order = number, permutation(self.seed, 0, number, len(self.rows)).tolist()
        return self.rows[self._order[place]]


class PromptSchedule(Generic[T]):
    """Passes over `prompts`, each in an order of its own; a pass may end in the middle of a step.

    per_step: replies of a step.  num_generations: replies to one prompt, which stand next to each other."""

    def __init__(self, prompts: Sequence[T], per_step: int, num_generations: int, seed: int) -> None:
        self.prompts, self.num_generations = prompts, num_generations
        self.passes = Passes(prompts, seed)
        self.prompts_per_step = per_step // num_generations
        if len(prompts) < self.prompts_per_step:
            raise DataError.at(
                "data.train",
                f"{len(prompts)} prompts < {self.prompts_per_step} prompts of one step",
                f"at least {self.prompts_per_step}",
                str(len(prompts)),
                "add prompts, or lower rollout_batch_size",
            )

    def steps(self, num_train_epochs: float) -> int:
        """Steps in so many passes, at least one."""
        return max(int(num_train_epochs * len(self.prompts)) // self.prompts_per_step, 1)

    def step(self, step: int) -> list[T]:
        """The prompt of each row of `step` (steps count from 1)."""
        first = (step - 1) * self.prompts_per_step
        chosen = [self.passes.at(first + i) for i in range(self.prompts_per_step)]
        return [prompt for prompt in chosen for _ in range(self.num_generations)]


def response_budgets(rows: int, shortest: int | None, longest: int, seed: int, step: int) -> list[int]:
    """The longest reply of each row: `longest`, or drawn evenly from [shortest, longest] (the ancestor's length sampler)."""
    if shortest is None:
        return [longest] * rows
    import torch

    drawn = uniforms(torch.tensor([derived_seed(seed, "budget", step)]), torch.arange(rows))
    return [shortest + int(u * (longest - shortest + 1)) for u in drawn.tolist()]
