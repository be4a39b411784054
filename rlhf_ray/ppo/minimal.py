"""PPO on LoRA adapters in one function: no Ray, no DeepSpeed, no checkpoints, no guards. Read it first, copy it, then read loop.py.

    from rlhf_ray.ppo.minimal import minimal_ppo
    adapter, metrics = minimal_ppo(PPOConfig(...), reward=lambda prompts, completions: [...], steps=10)

One base model is loaded once and frozen; policy, value model and, if the job names an SFT run, the reference are LoRA adapters on
it. The algorithm is that of arXiv:1909.08593 with the details of arXiv:2403.17031. On one process and in float32 its steps are
those of the real loop, number by number (tests/integration/ppo/test_minimal.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rlhf_ray.batches import Sequences
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.collate import pad_left, pad_right
from rlhf_ray.data.continuation import decoder
from rlhf_ray.data.templates import load_template
from rlhf_ray.maths import kl, losses, returns
from rlhf_ray.maths.controllers import make_controller
from rlhf_ray.maths.masks import masked_sum, zero_outside
from rlhf_ray.maths.rng import permutation, row_seed
from rlhf_ray.maths.schedules import lr_multiplier, resolve_warmup
from rlhf_ray.models.adapters import adapter_parameters, adapter_tensors
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.forward import to_device
from rlhf_ray.models.specs import policy_source
from rlhf_ray.ppo.prompts import load_prompts
from rlhf_ray.sampler.engine import DecodeRequest, Sampler

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, completions) -> a reward each; the first arguments of TRL's reward functions."""


def minimal_ppo(
    config: PPOConfig, reward: Reward, steps: int, device: torch.device | None = None
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train for `steps` steps. Returns the policy adapter (plain PEFT key -> f32 on the CPU) and each step's metrics.

    Fields of `config` that this file does not mention are not looked at: rewards, placement, GRPO and RLOO, staleness,
    evaluation."""
    device = device or torch.device("cpu")

    # Models: the frozen base, the policy and its frozen reference, the value model with a head that starts at zero.
    assembly = Assembly(config, device, config.seed, config.stop_token_ids)
    base, told = assembly.base, (config.template_date, config.chat_template_kwargs)
    template = load_template(config.template, base.tokenizer, *told)
    assembly.add_trained_policy(policy_source(config.sft) if config.sft is not None else None, config.lora)
    assembly.add_value("policy", "own", config.value.lora)
    models = assembly.finish()
    peft = models.stack_of("policy").peft
    sampler = Sampler(peft, base.pad_id, max_rows=min(64, config.chunk_rows))
    prompts = load_prompts(config, base, template).schedule

    # One optimizer, two groups: policy and value model have learning rates and clipping norms of their own.
    policy = list(adapter_parameters(peft, "policy").values())
    value = [*adapter_parameters(peft, "value").values(), *models.head_of("value").parameters()]
    betas = (config.adam_beta1, config.adam_beta2)
    groups = [{"params": policy, "lr": 0.0}, {"params": value, "lr": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay)
    peaks = (config.learning_rate, config.value.learning_rate or 0.0)
    total = config.max_steps if config.max_steps > 0 else prompts.steps(config.num_train_epochs)
    warmup = resolve_warmup(config.warmup_steps, total)
    controller = make_controller(
        config.kl_controller, config.kl_coef, config.kl_target, config.kl_horizon, config.kl_step_size
    )
    history: list[dict[str, float]] = []

    for step in range(1, steps + 1):
        # 1. Sample a reply to each prompt with the policy as it is. Token t of row i uses the random number of (seed, step, i, t).
        rows = prompts.step(step)
        requests = [
            DecodeRequest(
                tuple(row.ids),
                row_seed(config.seed, "rollout", step, i),
                config.response_length,
                base.stop_ids(template),
                config.temperature,
                adapter="policy",
            )
            for i, row in enumerate(rows)
        ]
        size = config.chunk_rows
        responses = [r for start in range(0, len(rows), size) for r in sampler.run(requests[start : start + size])]
        prompt_ids, prompt_mask = pad_left([row.ids for row in rows], base.pad_id)
        response_ids, mask = pad_right([response.token_ids for response in responses], base.pad_id)
        tokens = torch.cat([prompt_ids, response_ids], dim=1)
        finished = torch.tensor([response.finished for response in responses])
        lengths = prompt_mask.sum(dim=1) + mask.sum(dim=1)

        def sequences(
            index: Tensor, tokens: Tensor = tokens, prompt_mask: Tensor = prompt_mask, mask: Tensor = mask
        ) -> Sequences:
            """Some rows, without columns that are padding in all of them, on the device."""
            return to_device(Sequences.trim(tokens[index], prompt_mask[index], mask[index], packed=True), device)

        # 2. Score: a reward for each reply; log-probabilities of its tokens under the frozen reference.
        reply_text = decoder(base.tokenizer, template)
        texts = [reply_text(row.ids, response.token_ids) for row, response in zip(rows, responses)]
        rewards = torch.tensor(reward([template.render(row.row.prompt) for row in rows], texts), dtype=torch.float32)
        reference = torch.zeros(mask.shape)
        with torch.no_grad():
            for index in (
                i for chunk in torch.arange(len(rows)).split(size) for i in by_length(chunk, lengths, config)
            ):
                logprobs, _ = models("logprobs", "reference", sequences(index), config.temperature)
                reference[index, : logprobs.shape[1]] = logprobs.cpu()

        # 3. Evaluate: the learner's own log-probabilities and values, in the very batches of the first epoch, so that the first
        #    probability ratio is exactly 1.
        old, old_values, after_end = torch.zeros(mask.shape), torch.zeros(mask.shape), torch.zeros(len(rows))
        with torch.no_grad():
            for index in (i for minibatch in minibatches(config, step, 0, lengths) for i in minibatch):
                logprobs, _, values, bootstrap = models("both", sequences(index), config.temperature)
                old[index, : logprobs.shape[1]] = logprobs.cpu()
                old_values[index, : values.shape[1]] = values.cpu()
                after_end[index] = bootstrap.cpu()

        # 4. Shape: each token pays for leaving the reference, the last one earns the reward; GAE; whitening over the whole step.
        per_token = zero_outside(kl.penalty(config.kl_penalty, old, reference), mask)
        scores = returns.penalise_unfinished(rewards, finished, config.missing_eos_penalty)
        if config.bootstrap_truncated:  # what a reply that was cut off is still to earn is in the value after it
            scores, after_end = scores.masked_fill(~finished, 0.0), after_end.masked_fill(finished, 0.0)
        else:
            after_end = torch.zeros_like(after_end)
        shaped = returns.shape_rewards(scores, per_token, controller.value, mask)
        advantages, targets = returns.gae(shaped, old_values, mask, config.gamma, config.lam, after_end)
        if config.whiten_advantages:
            advantages = returns.whiten(advantages, mask, subtract_mean=True, eps=1e-8)

        # 5. Update: a few epochs of minibatches on the clipped losses; sums over tokens, divided by the minibatch's token count.
        factor = lr_multiplier(config.lr_scheduler_type, step - 1, total, warmup, config.min_lr_ratio)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        for epoch in range(config.num_ppo_epochs):
            for minibatch in minibatches(config, step, epoch, lengths):
                count = int(mask[torch.cat(minibatch)].sum())
                for index in minibatch:
                    seq = sequences(index)
                    width, real = seq.response_width, seq.response_mask
                    o, a, v, t = (x[index, :width].to(device) for x in (old, advantages, old_values, targets))
                    new, _ = models("logprobs", "policy", seq, config.temperature)
                    (losses.policy_loss_sum(new, o, a, real, config.cliprange)[0] / count).backward()
                    new_values, _ = models("values", seq)
                    loss = losses.value_loss_sum(new_values, v, t, real, config.cliprange_value)[0]
                    (config.vf_coef * loss / count).backward()
                for parameters in (policy, value):
                    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

        # 6. The adapter in the model is what the next step samples with. The KL coefficient moves once.
        measured = float(masked_sum(kl.k1(old, reference), mask, dim=1).mean())
        history.append(
            {
                "reward/mean": float(rewards.mean()),
                "kl/k1_per_response": measured,
                "kl/coef": controller.value,
                "response/length": float(mask.sum(dim=1).float().mean()),
            }
        )
        controller.update(measured, len(rows))
    return adapter_tensors(peft, "policy"), history


def minibatches(config: PPOConfig, step: int, epoch: int, lengths: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """One optimizer step each, cut into batches that fit into memory: row indices i64[M]. A permutation of (seed, step, epoch)."""
    for minibatch in permutation(config.seed, step, epoch, len(lengths)).chunk(config.num_mini_batches):
        yield by_length(minibatch, lengths, config)


def by_length(rows: Tensor, lengths: Tensor, config: PPOConfig) -> tuple[Tensor, ...]:
    """Rows of like length together, the longest first: as little padding as can be. A gradient is a sum over rows in any order."""
    longest_first = rows[torch.argsort(lengths[rows], descending=True, stable=True)]
    return longest_first.split(config.per_device_train_batch_size)
