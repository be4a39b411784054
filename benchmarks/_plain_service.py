"""The service that a tutorial writes: FastAPI around transformers' `generate`, one request after the other.

python _plain_service.py MODEL_FOLDER PORT THREADS
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


def application(folder: str) -> FastAPI:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    free, app = threading.Lock(), FastAPI()

    def reply(body: dict[str, Any]) -> Iterator[str]:
        with free:
            inputs = tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
            how = {"max_new_tokens": body["max_tokens"], "do_sample": False, "pad_token_id": 0}
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **how, "streamer": streamer})
            thread.start()
            for text in streamer:
                yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
            thread.join()
        yield "data: [DONE]\n\n"

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(reply(body), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
