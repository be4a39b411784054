"""The decode engine: continuous batching over a transformers model and its key-value cache.

In come `DecodeRequest`s, each with its own adapter, seed, temperature and stop tokens; out come tokens with their
log-probabilities. Rollouts, evaluation and the service all sample here. Read `requests.py` (the interface, which another engine can
implement), then `engine.py`; `rows.py`, `kv_cache.py` hold what is being decoded, `sampling.py` turns logits into tokens, and
`adapter_routing.py`, `stacked_lora.py`, `factor_pages.py` put many adapters into one batch. It must not know rewards, PPO or HTTP.
"""
