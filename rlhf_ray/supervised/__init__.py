"""Supervised fine-tuning and reward modelling, around transformers' Trainer.

In comes an `SFTConfig` or a `RewardConfig`; out goes a run folder with a LoRA adapter. `sft.py` and `reward.py` are the two stages
(what is trained, on what, by which loss), `stage.py` is what they share from job to finished folder, `trainer.py` adapts Trainer,
`callback.py` evaluates and saves between steps, `checkpoint.py` stores and restores, `batch_sampler.py` orders rows. It must not
know PPO.
"""
