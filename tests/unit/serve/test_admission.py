"""Admission control in Serve's proxy: requests up to the capacity of the service pass, others are refused without reaching it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.admission import CAPACITY_HEADER, AdmissionControl, capacity_header
from rlhf_ray.serve.metrics import NoMetrics


class Service:
    """The application behind the middleware. Responds once `may_respond` is set, with its capacity in a header."""

    def __init__(self, max_requests: int) -> None:
        self.max_requests, self.requests, self.may_respond = max_requests, 0, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        while (await receive()).get("more_body"):
            pass
        await self.may_respond.wait()
        headers = [(b"content-type", b"text/plain"), (CAPACITY_HEADER, b"%d;7" % self.max_requests)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"text"})


class Counted(NoMetrics):
    def __init__(self) -> None:
        self.refused = 0.0

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        self.refused += value


async def send_request(
    control: AdmissionControl,
    path: str = "/v1/completions",
    method: str = "POST",
    receive: Callable[[], Any] | None = None,
) -> tuple[int, dict[bytes, bytes], bytes]:
    sent: list[Any] = []

    async def body() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await control({"type": "http", "path": path, "method": method}, receive or body, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def at_capacity(
    max_requests: int = 2, path: str = "/v1/completions"
) -> tuple[AdmissionControl, Service, list[asyncio.Task[Any]], Counted]:
    """A middleware that knows the capacity of its service, with that many requests in flight."""
    service, counted = Service(max_requests), Counted()
    control = AdmissionControl(service, counted)
    service.may_respond.set()
    await send_request(control, path)
    service.may_respond.clear()
    in_flight = [asyncio.create_task(send_request(control, path)) for _ in range(max_requests)]
    await asyncio.sleep(0)
    return control, service, in_flight, counted


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_requests_beyond_the_capacity_are_refused_until_others_end() -> None:
    async def scenario() -> None:
        control, service, in_flight, counted = await at_capacity()
        status, headers, body = await send_request(control)
        assert status == 429 and headers[b"retry-after"] == b"7" and headers[b"x-content-type-options"] == b"nosniff"
        assert json.loads(body)["error"]["code"] == "rate_limit_exceeded" and int(headers[b"content-length"]) == len(
            body
        )
        assert service.requests == 3 and counted.refused == 1
        assert (await send_request(control, "/v1/score"))[0] == 429, "it takes places as well"
        service.may_respond.set()
        assert [status for status, _, _ in await asyncio.gather(*in_flight)] == [200, 200]
        assert (await send_request(control))[0] == 200

    run(scenario)


def test_a_client_that_has_its_response_may_send_the_next_request_at_once() -> None:
    """Serve's proxy has work left after the last chunk of a response; its client sends the next request meanwhile."""

    async def scenario() -> None:
        control, service, in_flight, _ = await at_capacity(1)
        last = asyncio.Event()
        respond = service.__call__

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await respond(scope, receive, send)
            last.set()
            await asyncio.Event().wait()

        service.may_respond.set()
        await in_flight[0]
        control.app = slow
        lingering = asyncio.create_task(send_request(control))
        await last.wait()
        control.app = service
        assert (await send_request(control))[0] == 200
        lingering.cancel()

    run(scenario)


def test_a_client_that_disconnects_and_a_service_that_fails_are_not_counted_any_more() -> None:
    async def scenario() -> None:
        control, service, in_flight, _ = await at_capacity(1)
        in_flight[0].cancel()
        await asyncio.sleep(0)
        service.may_respond.set()
        assert (await send_request(control))[0] == 200
        control.app = lambda *_: (_ for _ in ()).throw(RuntimeError)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await send_request(control)
        control.app = service
        assert (await send_request(control))[0] == 200

    run(scenario)


def test_a_request_without_its_body_is_not_counted() -> None:
    async def scenario() -> None:
        control, service, in_flight, _ = await at_capacity(2)
        in_flight[0].cancel()

        async def never() -> Any:
            await asyncio.Event().wait()

        slow = [asyncio.create_task(send_request(control, receive=never)) for _ in range(5)]
        await asyncio.sleep(0)
        service.may_respond.set()
        assert (await send_request(control))[0] == 200
        for task in slow:
            task.cancel()

    run(scenario)


def test_other_routes_and_other_applications_are_not_counted() -> None:
    async def scenario() -> None:
        control, service, _, _ = await at_capacity(1)
        assert (await send_request(control))[0] == 429
        service.may_respond.set()
        for path, method in (
            ("/v1/models", "GET"),
            ("/", "GET"),
            ("/v1/preferences", "POST"),
            ("/b/v1/compare", "POST"),
        ):
            assert (await send_request(control, path, method))[0] == 200, path

    run(scenario)


def test_until_the_capacity_is_known_every_request_passes_and_the_header_is_removed() -> None:
    async def scenario() -> None:
        service = Service(1)
        control = AdmissionControl(service, NoMetrics())
        several = [asyncio.create_task(send_request(control)) for _ in range(5)]
        await asyncio.sleep(0)
        service.may_respond.set()
        responses = await asyncio.gather(*several)
        assert [status for status, _, _ in responses] == [200] * 5
        assert all(
            CAPACITY_HEADER not in headers and headers[b"content-type"] == b"text/plain" for _, headers, _ in responses
        )

    run(scenario)


def test_the_capacity_is_that_of_all_replicas(tmp_path: Path) -> None:
    limits = {"max_batch_rows": 8, "max_waiting_rows": 4, "retry_after_s": 3}
    for replicas, max_requests in (({"min_replicas": 2}, 24), ({"min_replicas": 1, "max_replicas": 5}, 60)):
        config = ServeConfig(output_dir=str(tmp_path), model_name_or_path="m", limits=limits, replicas=replicas)  # type: ignore[arg-type]
        assert capacity_header(config) == (CAPACITY_HEADER, b"%d;3" % max_requests)


def test_the_callback_returns_what_serve_expects() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    from rlhf_ray.serve.admission import CALLBACK

    (middleware,) = validate_http_proxy_callback_return(call_function_from_import_path(CALLBACK))
    assert middleware.cls is AdmissionControl


def test_prefixes_that_clients_make_up_are_forgotten() -> None:
    """Each of them was kept for good, before authentication."""

    async def run() -> None:
        service = Service(5)
        service.may_respond.set()
        control = AdmissionControl(service, Counted())
        for i in range(500):
            await send_request(control, f"/{i}/v1/completions")
        await send_request(control)
        assert len(control.capacities) <= 64 and control.capacities[""].max_requests == 5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("field", "status"), [({"path": "/" + "x" * 5000}, 414), ({"headers": [(b"x-a", b"y" * 40_000)]}, 431)]
)
def test_long_paths_and_headers_go_no_further(field: dict[str, Any], status: int) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        service = Service(5)
        control = AdmissionControl(service, Counted())
        await control({"type": "http", "path": "/", "method": "GET", **field}, None, send)
        assert sent[0]["status"] == status and service.requests == 0

    asyncio.run(run())
