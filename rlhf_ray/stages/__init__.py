"""The commands that use trained adapters or run several stages: evaluate, generate, score, pipeline, demo, resume.

Each has a public function of the same name. `evaluation_models.py` loads policies and rewards side by side, `win_rates.py` compares
policies prompt by prompt. Training itself is in `supervised` and `ppo`.
"""
