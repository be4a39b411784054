"""Supervised fine-tuning, DPO and reward modelling, around transformers' Trainer.

In comes an `SFTConfig`, `DPOConfig` or `RewardConfig`; out goes a run folder with a LoRA adapter. `sft.py`, `dpo.py` and
`reward.py` are the stages (what is trained, on what, by which loss; `pairs.py`: what the last two share), `stage.py` is what all
share from job to finished folder, `trainer.py` adapts Trainer, `callback.py` evaluates and saves between steps, `checkpoint.py`
stores and restores, `batch_sampler.py` orders rows. It must not know PPO.
"""
