"""The commands that use trained adapters or run several stages: evaluate, generate, score, pipeline, demo, resume.

Each has a public function of the same name. `evaluation_models.py` loads policies and rewards side by side, `win_rates.py` compares
policies prompt by prompt. Run folders, adapters and prompts come in; replies, scores, tables and the report's data go out. It must
not train: that is in `supervised` and `ppo`, which know nothing of this room.
"""
