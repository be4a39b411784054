"""The service: adapters of one base behind an OpenAI-compatible API, hosted by Ray Serve."""
