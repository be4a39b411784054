"""The gate in Serve's proxy: as many requests inside as the service has places, the others refused without asking anyone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.admission import HEADER, AdmissionControl, told
from rlhf_ray.serve.metrics import NoMetrics


class Service:
    """What stands behind the gate. Answers when it may; tells its places."""

    def __init__(self, places: int) -> None:
        self.places, self.asked, self.may_answer = places, 0, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        while (await receive()).get("more_body"):
            pass
        await self.may_answer.wait()
        headers = [(b"content-type", b"text/plain"), (HEADER, b"%d;7" % self.places)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"said"})


class Counted(NoMetrics):
    def __init__(self) -> None:
        self.refused = 0.0

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        self.refused += value


async def ask(
    gate: AdmissionControl,
    path: str = "/v1/completions",
    method: str = "POST",
    receive: Callable[[], Any] | None = None,
) -> tuple[int, dict[bytes, bytes], bytes]:
    said: list[Any] = []

    async def body() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    await gate({"type": "http", "path": path, "method": method}, receive or body, send)
    return said[0]["status"], dict(said[0]["headers"]), said[1]["body"]


async def full(
    places: int = 2, path: str = "/v1/completions"
) -> tuple[AdmissionControl, Service, list[asyncio.Task[Any]], Counted]:
    """A gate that has learnt its places, all of them taken."""
    service, counted = Service(places), Counted()
    gate = AdmissionControl(service, counted)
    service.may_answer.set()
    await ask(gate, path)
    service.may_answer.clear()
    inside = [asyncio.create_task(ask(gate, path)) for _ in range(places)]
    await asyncio.sleep(0)
    return gate, service, inside, counted


def story(one: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(one(), 10))


def test_what_is_too_much_is_refused_and_a_place_that_is_left_is_taken() -> None:
    async def one() -> None:
        gate, service, inside, counted = await full()
        status, headers, body = await ask(gate)
        assert status == 429 and headers[b"retry-after"] == b"7" and headers[b"x-content-type-options"] == b"nosniff"
        assert json.loads(body)["error"]["code"] == "rate_limit_exceeded" and int(headers[b"content-length"]) == len(
            body
        )
        assert service.asked == 3 and counted.refused == 1
        service.may_answer.set()
        assert [status for status, _, _ in await asyncio.gather(*inside)] == [200, 200]
        assert (await ask(gate))[0] == 200

    story(one)


def test_a_client_that_has_its_answer_may_ask_at_once() -> None:
    """Serve's proxy has work left after the last piece of an answer; who has got that piece asks again meanwhile."""

    async def one() -> None:
        gate, service, inside, _ = await full(1)
        last = asyncio.Event()
        answered = service.__call__

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await answered(scope, receive, send)
            last.set()
            await asyncio.Event().wait()

        service.may_answer.set()
        await inside[0]
        gate.app = slow
        lingering = asyncio.create_task(ask(gate))
        await last.wait()
        gate.app = service
        assert (await ask(gate))[0] == 200
        lingering.cancel()

    story(one)


def test_a_client_that_leaves_and_a_service_that_fails_give_their_places_back() -> None:
    async def one() -> None:
        gate, service, inside, _ = await full(1)
        inside[0].cancel()
        await asyncio.sleep(0)
        service.may_answer.set()
        assert (await ask(gate))[0] == 200
        gate.app = lambda *_: (_ for _ in ()).throw(RuntimeError)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await ask(gate)
        gate.app = service
        assert (await ask(gate))[0] == 200

    story(one)


def test_a_body_that_does_not_come_takes_no_place() -> None:
    async def one() -> None:
        gate, service, inside, _ = await full(2)
        inside[0].cancel()

        async def never() -> Any:
            await asyncio.Event().wait()

        slow = [asyncio.create_task(ask(gate, receive=never)) for _ in range(5)]
        await asyncio.sleep(0)
        service.may_answer.set()
        assert (await ask(gate))[0] == 200
        for task in slow:
            task.cancel()

    story(one)


def test_other_routes_and_other_applications_are_not_counted() -> None:
    async def one() -> None:
        gate, service, _, _ = await full(1)
        assert (await ask(gate))[0] == 429
        service.may_answer.set()
        for path, method in (
            ("/v1/models", "GET"),
            ("/", "GET"),
            ("/v1/preferences", "POST"),
            ("/b/v1/compare", "POST"),
        ):
            assert (await ask(gate, path, method))[0] == 200, path

    story(one)


def test_until_the_service_has_told_everything_passes_and_what_it_tells_stays_inside() -> None:
    async def one() -> None:
        service = Service(1)
        gate = AdmissionControl(service, NoMetrics())
        several = [asyncio.create_task(ask(gate)) for _ in range(5)]
        await asyncio.sleep(0)
        service.may_answer.set()
        answers = await asyncio.gather(*several)
        assert [status for status, _, _ in answers] == [200] * 5
        assert all(HEADER not in headers and headers[b"content-type"] == b"text/plain" for _, headers, _ in answers)

    story(one)


def test_all_copies_have_places(tmp_path: Path) -> None:
    limits = {"max_batch_rows": 8, "max_waiting_rows": 4, "retry_after_s": 3}
    for replicas, places in (({"min_replicas": 2}, 24), ({"min_replicas": 1, "max_replicas": 5}, 60)):
        config = ServeConfig(output_dir=str(tmp_path), model_name_or_path="m", limits=limits, replicas=replicas)  # type: ignore[arg-type]
        assert told(config) == (HEADER, b"%d;3" % places)


def test_the_callback_gives_serve_what_it_asks_for() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    from rlhf_ray.serve.admission import CALLBACK

    (made,) = validate_http_proxy_callback_return(call_function_from_import_path(CALLBACK))
    assert made.cls is AdmissionControl
