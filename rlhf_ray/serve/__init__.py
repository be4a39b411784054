"""The service: many adapters of one base behind an OpenAI-compatible API, hosted by Ray Serve.

In come a `ServeConfig` and HTTP requests; out go responses and server-sent events, Prometheus metrics, and the files access.jsonl,
preferences.jsonl and replicas/<replica>.json in `output_dir`. Names follow the registry, which this package only reads.

Two kinds of processes share it. The API (api.py) knows HTTP, keys and limits, and must not import torch; neither may Serve's proxy,
which runs admission.py. A replica (replica.py) holds the base, its adapters and the decode thread, and knows nothing of HTTP or
Ray. Plain data alone crosses between them: generation.py. Nothing here trains, or changes an adapter.

Read app.py first, then follow a request: api.py, generation.py, replica.py, generation_stream.py, decode_thread.py.
"""
