"""What clients see that wait: their turn, the truth about it, and when to come back."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

from harness import Gateway, StartGateway, events_in


async def at_work(gateway: Gateway, answered: int, waiting: int, uid: str = "fake") -> dict[str, Any]:
    """The facts of the queue, once they are so."""
    async with asyncio.timeout(20):
        while True:
            facts: dict[str, Any] = (await gateway.get(f"/v1/models/{uid}/queue")).json
            if (facts["in_flight"], facts["waiting"]) == (answered, waiting):
                return facts
            await asyncio.sleep(0.02)


async def test_who_waits_at_the_limit_is_served_in_the_order_of_coming(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(
        fake={"tokens": 1, "first_token_delay_s": 0.2, "events_file": str(events)},
        model={"request_limits": 1, "queue_limit": 20, "preload": True},
    )
    await gateway.until(state="ready")
    tasks = []
    for number in range(6):
        tasks.append(asyncio.create_task(ask(gateway, str(number))))
        await at_work(gateway, 1, number)
    answers = await asyncio.gather(*tasks)
    assert [answer.status for answer in answers] == [200] * 6
    assert [event["id"] for event in events_in(events, "request")] == list("012345")
    assert "x-hostler-queue-ms" not in answers[0].headers
    waits = [int(answer.headers["x-hostler-queue-ms"]) for answer in answers[1:]]
    assert waits == sorted(waits)
    assert waits[-1] > 600


async def ask(gateway: Gateway, request_id: str, **options: Any) -> Any:
    body = {"model": "fake", "prompt": "x"} | options
    return await gateway.post("/v1/completions", body, headers={"x-request-id": request_id})


async def test_a_full_queue_refuses_with_the_time_to_come_back(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        fake={"tokens": 1, "first_token_delay_s": 2.5},
        model={"request_limits": 1, "queue_limit": 1, "preload": True},
    )
    await gateway.until(state="ready")
    tasks = [asyncio.create_task(gateway.complete())]
    await at_work(gateway, 1, 0)
    tasks.append(asyncio.create_task(gateway.complete()))
    facts = await at_work(gateway, 1, 1)
    assert (facts["queue_limit"], facts["request_limits"], facts["is_held"]) == (1, 1, False)
    refused = await gateway.complete()
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    assert "1 requests wait for the model already" in refused.error["message"]
    assert "fake is busy with 1 request" in refused.error["message"]
    assert refused.headers["retry-after"] == "1"
    await asyncio.sleep(1.2)
    assert (await gateway.complete()).headers["retry-after"] == "2"  # as long as the first has waited by now
    assert [(await task).status for task in tasks] == [200, 200]
    text = (await gateway.get("/metrics")).body.decode()
    assert 'hostler_requests_refused_total{model="fake",reason="queue_full"} 2.0' in text
    assert re.search(r'hostler_queue_oldest_wait_seconds\{model="fake"\} 0', text)


async def test_the_sites_queue_limit_bounds_who_waits_for_a_load(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 1.5}, queue_limit=2)
    tasks = [asyncio.create_task(gateway.complete()) for _ in range(2)]
    await at_work(gateway, 0, 2)
    refused = await gateway.complete()
    assert refused.status == 429
    assert "fake is loading: " in refused.error["message"]
    assert [(await task).status for task in tasks] == [200, 200]


async def test_a_model_for_which_nobody_may_wait_is_loaded_by_who_is_refused(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"queue_limit": 0})
    assert (await gateway.complete()).status == 429
    await gateway.until(state="ready")
    assert (await gateway.complete()).status == 200


async def test_a_stream_that_waits_is_told_its_number_and_how_far_the_load_is(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 1.5, "tokens": 1}, keepalive_interval_s=0.2)
    first = asyncio.create_task(gateway.complete())
    await at_work(gateway, 0, 1)
    lines = await gateway.stream()
    comments = [line for line in lines if line.startswith(":")]
    assert any(
        re.fullmatch(r": fake is loading: starting, \d s; number 2 of 2 in the queue", line) for line in comments
    )
    assert (await first).status == 200
    # The next start is measured by this one.
    await gateway.post("/v1/models/fake/stop")
    comments = [line for line in await gateway.stream() if line.startswith(":")]
    told = [re.search(r"starting (\d+) %, \d s, (about \d s left|ready soon); number 1 of 1", one) for one in comments]
    percents = [int(one[1]) for one in told if one]
    assert percents
    assert percents == sorted(percents)


async def test_a_place_in_the_queue_outlasts_the_comments(start_gateway: StartGateway, tmp_path: Path) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(
        fake={"tokens": 1, "first_token_delay_s": 0.6, "events_file": str(events)},
        model={"request_limits": 1, "queue_limit": 20, "preload": True},
        keepalive_interval_s=0.1,
    )
    await gateway.until(state="ready")
    tasks = [asyncio.create_task(ask(gateway, "first"))]
    await at_work(gateway, 1, 0)
    for number, stream in enumerate((True, False, True), 1):
        tasks.append(asyncio.create_task(ask(gateway, str(number), stream=stream)))
        await at_work(gateway, 1, number)
    answers = await asyncio.gather(*tasks)
    assert [event["id"] for event in events_in(events, "request")] == ["first", "1", "2", "3"]
    comments = [line for line in answers[3].body.decode().splitlines() if line.startswith(":")]
    numbers = [int(found[1]) for line in comments if (found := re.search("number (\\d) of", line))]
    assert (numbers[0], numbers[-1]) == (3, 1)
    assert numbers == sorted(numbers, reverse=True)


async def test_who_leaves_the_queue_gives_up_the_place(start_gateway: StartGateway, tmp_path: Path) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(
        fake={"tokens": 1, "first_token_delay_s": 0.5, "events_file": str(events)},
        model={"request_limits": 1, "queue_limit": 20, "preload": True},
    )
    await gateway.until(state="ready")
    tasks = [asyncio.create_task(ask(gateway, "0"))]
    await at_work(gateway, 1, 0)
    for number in range(1, 4):
        tasks.append(asyncio.create_task(ask(gateway, str(number))))
        await at_work(gateway, 1, number)
    tasks[2].cancel()
    await at_work(gateway, 1, 2)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(answer, "status", None) for answer in answers] == [200, 200, None, 200]
    assert [event["id"] for event in events_in(events, "request")] == ["0", "1", "3"]
    await at_work(gateway, 0, 0)


async def test_a_load_that_takes_too_long_says_when_to_come_back(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 1.2}, model={"load_timeout_s": 0.3})
    refused = await gateway.complete()
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "model_loading", "10")
    await gateway.until(state="ready")
    await gateway.post("/v1/models/fake/stop")
    refused = await gateway.complete()
    assert (refused.status, refused.headers["retry-after"]) in ((503, "1"), (503, "2"))  # measured by the last start


async def test_a_crash_lets_who_waits_go_on_with_the_next_life(start_gateway: StartGateway, tmp_path: Path) -> None:
    behaviour = {"tokens": 1, "first_token_delay_s": 0.3, "die_after_requests": 1, "die_only_first": True}
    behaviour["counter_file"] = str(tmp_path / "starts")
    gateway = await start_gateway(fake=behaviour, model={"request_limits": 1, "queue_limit": 20, "preload": True})
    await gateway.until(state="ready")
    answers = await asyncio.gather(*(gateway.complete() for _ in range(5)))
    assert [answer.status for answer in answers] == [200] * 5
    await at_work(gateway, 0, 0)


# --- conversations and copies


def chat(*texts: str, system: str = "You are a test. " * 100) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    messages += [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"model": "fake", "messages": messages}


async def copy_for(gateway: Gateway, body: dict[str, Any], **headers: str) -> str:
    answer = await gateway.post("/v1/chat/completions", body, headers=headers)
    assert answer.status == 200, answer.body
    return str(answer.headers["x-hostler-replica"])


async def test_a_conversation_goes_back_to_the_copy_that_knows_it(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 1}, model={"replica": 3, "preload": True})
    async with asyncio.timeout(20):
        while [one["state"] for one in await gateway.replicas()] != ["ready"] * 3:
            await asyncio.sleep(0.05)
    firsts = [await copy_for(gateway, chat(f"question {number}")) for number in range(30)]
    assert set(firsts) == {"0", "1", "2"}
    laters = [await copy_for(gateway, chat(f"question {number}", "answer", "more")) for number in range(30)]
    assert laters == firsts
    # A session that is named counts for more than the words.
    for name in ("x-session-id", "X-Session-ID"):
        assert len({await copy_for(gateway, chat(f"other {n}"), **{name: "s1"}) for n in range(10)}) == 1
    # What is short goes where there is least to do, whatever it says.
    assert await copy_for(gateway, chat("hi", system="")) == "0"
    sessions = {await copy_for(gateway, chat("same"), **{"x-session-id": f"s{number}"}) for number in range(30)}
    assert sessions == {"0", "1", "2"}
