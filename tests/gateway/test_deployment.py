"""One uid at work, on real replicas with fake engines: starts on demand, drains, unloads, tries again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from harness import a_node

from engines.base import EngineSettings, Launch
from engines.llama_cpp import LlamaCpp
from gateway.causes import Cause
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.devices import Limits, Observer, SimulatedMachine
from gateway.dispatch import Dispatcher
from gateway.errors import ModelFailed, ShuttingDown
from gateway.experience import Experience
from gateway.placement import Device
from gateway.replica import Replica, State
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

FAKE_ENGINE = Path(__file__).parents[1] / "fake_engine.py"
LIMIT_S = 20.0


@contextlib.asynccontextmanager
async def deployed(
    folder: Path,
    *,
    replica: int = 1,
    drain_timeout_s: float = 600,
    restart_limit: int = 5,
    model: str = "m.gguf",
    fields: dict[str, Any] | None = None,
    **behaviour: Any,
) -> AsyncIterator[Deployment]:
    """A deployment whose fake engines behave so; `fields` are of its Launch."""
    (folder / "m.gguf").write_bytes(b"GGUF")
    path = str(folder / model)
    spec = ModelSpec(model_format="ggufv2", model_hub="local", model_id=path)
    artifact = Artifact(
        family=LLMFamily(model_name="fake", model_specs=(spec,)),
        spec=spec,
        source=Source(model_hub="local", model_id=path),
    )
    envs = {
        "FAKE_ENGINE": json.dumps(behaviour),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # it asks `env` for Python
    }
    launch = Launch(uid="fake", artifact=artifact, engine="llama.cpp", replica=replica, envs=envs, **(fields or {}))
    engine = LlamaCpp(settings=EngineSettings(binary=str(FAKE_ENGINE)))
    async with a_node(folder / "home") as node:
        settings = Settings(home=str(folder), drain_timeout_s=drain_timeout_s, restart_limit=restart_limit)
        dispatcher = Dispatcher(lambda: [deployment], lambda: settings, no_devices, lambda uid, kind, text: None)
        deployment = Deployment(launch, engine, settings=lambda: settings, changed=dispatcher.poke)
        deployment.replicas = tuple(
            Replica(
                launch,
                index,
                engine,
                node,
                log=folder / f"{index}.log",
                settings=lambda: settings,
                place=partial(dispatcher.place, deployment),
                has_gpus=partial(Observer(SimulatedMachine().look).has_gpus, (), Limits()),
                experience=Experience(),
                tell=lambda kind, text: None,
                changed=deployment.notify,
            )
            for index in range(replica)
        )
        dispatching = asyncio.create_task(dispatcher.run())
        run = asyncio.create_task(deployment.run())
        try:
            yield deployment
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            dispatching.cancel()
            await asyncio.gather(dispatching, return_exceptions=True)


async def no_devices() -> tuple[Device, ...]:
    """Nothing but memory without end."""
    return ()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def acquire(deployment: Deployment) -> Replica:
    return await asyncio.wait_for(deployment.acquire(), LIMIT_S)


async def stopped(deployment: Deployment) -> None:
    await asyncio.wait_for(deployment.stopped(), LIMIT_S)


def pid_of(replica: Replica) -> int:
    assert replica.process is not None
    return replica.process.pid


# --- what its requests get


async def test_defaults_are_read_once_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Launch] = []

    def defaults(engine: LlamaCpp, launch: Launch) -> dict[str, Any]:
        asked.append(launch)
        return {"stop": [launch.uid]}

    monkeypatch.setattr(LlamaCpp, "defaults", defaults)
    async with deployed(tmp_path) as deployment:
        assert deployment.defaults == deployment.defaults == {"stop": ["fake"]}
        first = deployment.launch
        deployment.launch = msgspec.structs.replace(first, uid="other")
        assert deployment.defaults == {"stop": ["other"]}
        assert asked == [first, deployment.launch]


# --- starting


async def test_nothing_runs_until_somebody_asks(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        await asyncio.sleep(0.2)
        assert (deployment.state, deployment.replicas[0].starts) == (State.STOPPED, 0)
        assert deployment.is_settled
        assert deployment.pick() is None


async def test_a_request_starts_the_model_and_counts_as_in_flight_until_it_is_released(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        replica = await acquire(deployment)
        assert (deployment.state, deployment.in_flight, deployment.waiting) == (State.READY, 1, 0)
        assert psutil.pid_exists(pid_of(replica))
        deployment.release(replica, was_served=True)
        assert (deployment.in_flight, replica.served) == (0, 1)


async def test_a_preloaded_model_starts_by_itself(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"preload": True}) as deployment:
        assert not deployment.is_settled
        await until(lambda: deployment.state is State.READY)
        assert deployment.is_settled


async def test_a_start_loads_without_a_request(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        deployment.start()
        deployment.start()
        await until(lambda: deployment.state is State.READY)
        assert deployment.replicas[0].starts == 1


async def test_many_requests_at_once_share_one_start(tmp_path: Path) -> None:
    async with deployed(tmp_path, ready_after_s=0.3) as deployment:
        waiters = [asyncio.create_task(deployment.acquire()) for _ in range(100)]
        await until(lambda: deployment.waiting == 100)
        async with asyncio.timeout(LIMIT_S):
            replicas = await asyncio.gather(*waiters)
        assert (deployment.replicas[0].starts, deployment.in_flight, deployment.waiting) == (1, 100, 0)
        for replica in replicas:
            deployment.release(replica, was_served=True)
        assert deployment.in_flight == 0


async def test_waiters_that_all_leave_are_counted_no_more_and_the_next_one_is_served(tmp_path: Path) -> None:
    async with deployed(tmp_path, ready_after_s=0.5) as deployment:
        waiters = [asyncio.create_task(deployment.acquire()) for _ in range(20)]
        await until(lambda: deployment.waiting == 20)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        assert (deployment.waiting, deployment.in_flight) == (0, 0)
        await acquire(deployment)
        assert (deployment.waiting, deployment.in_flight) == (0, 1)


async def test_a_waiting_client_is_told_how_far_it_is(tmp_path: Path) -> None:
    async with deployed(tmp_path, never_ready=True) as deployment:
        deployment.start()
        await until(lambda: deployment.state is State.STARTING)
        assert deployment.progress_text().startswith("fake is loading: starting, ")
        deployment.stop(force=True)
        await stopped(deployment)
        assert deployment.progress_text() == "fake is stopped"


async def test_a_model_whose_load_is_stopped_does_not_go_on_loading(tmp_path: Path) -> None:
    async with deployed(tmp_path, never_ready=True) as deployment:
        deployment.start()
        await until(lambda: deployment.state is State.STARTING and deployment.replicas[0].process)
        pid = pid_of(deployment.replicas[0])
        deployment.stop()
        await stopped(deployment)
        assert deployment.state is State.STOPPED
        assert not psutil.pid_exists(pid)


# --- choosing a replica


async def test_the_replica_with_the_least_in_flight_is_picked(tmp_path: Path) -> None:
    async with deployed(tmp_path, replica=2, fields={"preload": True}) as deployment:
        await until(lambda: all(replica.state is State.READY for replica in deployment.replicas))
        taken = [await acquire(deployment) for _ in range(6)]
        one, other = deployment.replicas
        assert (one.in_flight, other.in_flight) == (3, 3)
        for replica in taken:
            if replica is other:
                deployment.release(replica, was_served=True)
        assert [await acquire(deployment) for _ in range(3)] == [other] * 3
        assert (one.in_flight, other.in_flight) == (3, 3)


async def test_a_replica_to_avoid_is_picked_only_if_there_is_no_other(tmp_path: Path) -> None:
    async with deployed(tmp_path, replica=2, fields={"preload": True}) as deployment:
        await until(lambda: all(replica.state is State.READY for replica in deployment.replicas))
        one, other = deployment.replicas
        for _ in range(3):
            deployment.take(other)
        assert deployment.pick() is one
        assert deployment.pick(avoid=one) is other
        os.kill(pid_of(other), signal.SIGKILL)
        await until(lambda: other.state is not State.READY)
        assert deployment.pick(avoid=one) is one


async def test_one_ready_replica_is_enough_to_serve(tmp_path: Path) -> None:
    behaviour = {"exit_before_ready_times": 1, "counter_file": str(tmp_path / "starts")}
    async with deployed(tmp_path, replica=2, restart_limit=1, **behaviour) as deployment:
        replica = await acquire(deployment)
        await until(lambda: State.FAILED in {other.state for other in deployment.replicas})
        assert (deployment.state, deployment.has_failed) == (State.READY, False)
        assert deployment.pick() is replica


# --- unloading


async def test_an_idle_model_is_unloaded_and_loaded_again_by_the_next_request(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"idle_timeout_s": 0.2}) as deployment:
        replica = await acquire(deployment)
        pid = pid_of(replica)
        deployment.release(replica, was_served=True)
        await until(lambda: deployment.state is State.STOPPED)
        assert not psutil.pid_exists(pid)
        assert await acquire(deployment) is replica
        assert replica.starts == 2


async def test_a_preloaded_model_that_nobody_asks_is_idle_from_its_start(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"idle_timeout_s": 0.2, "preload": True}) as deployment:
        await until(lambda: deployment.replicas[0].starts == 1 and deployment.state is State.STOPPED)
        assert deployment.is_settled


async def test_a_model_with_a_request_in_flight_is_not_idle(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"idle_timeout_s": 0.1}) as deployment:
        replica = await acquire(deployment)
        await asyncio.sleep(0.5)
        assert (deployment.state, replica.starts) == (State.READY, 1)
        deployment.release(replica, was_served=True)
        await until(lambda: deployment.state is State.STOPPED)


# --- stopping


async def test_a_stop_waits_for_requests_in_flight_and_takes_no_new_ones(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        replica = await acquire(deployment)
        deployment.stop()
        stopping = asyncio.create_task(deployment.stopped())
        await asyncio.wait([stopping], timeout=0.3)
        assert not stopping.done()
        assert deployment.state is State.STOPPING
        assert deployment.pick() is None
        assert replica.upstream is not None  # the request goes on
        deployment.release(replica, was_served=True)
        await asyncio.wait_for(stopping, LIMIT_S)
        assert deployment.state is State.STOPPED


async def test_a_stop_waits_no_longer_than_the_settings_say(tmp_path: Path) -> None:
    async with deployed(tmp_path, drain_timeout_s=0.2) as deployment:
        replica = await acquire(deployment)
        deployment.stop()
        await stopped(deployment)
        assert (deployment.state, deployment.in_flight) == (State.STOPPED, 1)
        deployment.release(replica, was_served=False)
        assert deployment.in_flight == 0


async def test_a_forced_stop_waits_for_nobody(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        await acquire(deployment)
        deployment.stop(force=True)
        await stopped(deployment)
        assert deployment.state is State.STOPPED


async def test_a_patient_stop_can_be_forced_later(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        await acquire(deployment)
        deployment.stop()
        await asyncio.sleep(0.05)
        deployment.stop(force=True)
        await stopped(deployment)
        assert deployment.state is State.STOPPED


async def test_a_forced_stop_gives_a_deaf_engine_less_time(tmp_path: Path) -> None:
    async with deployed(tmp_path, ignore_term=True) as deployment:
        await acquire(deployment)
        deployment.stop(force=True)
        await asyncio.wait_for(deployment.stopped(), 5)  # the engine's own grace is 10 s
        assert deployment.state is State.STOPPED


async def test_a_patient_stop_of_a_deaf_engine_can_be_forced_later(tmp_path: Path) -> None:
    async with deployed(tmp_path, ignore_term=True, events_file=str(tmp_path / "events")) as deployment:
        deployment.release(await acquire(deployment), was_served=True)
        deployment.stop()
        await until(lambda: '"term"' in (tmp_path / "events").read_text())
        deployment.stop(force=True)
        await asyncio.wait_for(deployment.stopped(), 5)  # the engine's own grace is 10 s
        assert deployment.state is State.STOPPED


async def test_a_forced_stop_of_a_stopped_model_forces_no_later_stop(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        deployment.stop(force=True)
        replica = await acquire(deployment)
        deployment.stop()
        stopping = asyncio.create_task(deployment.stopped())
        await asyncio.wait([stopping], timeout=0.5)
        assert not stopping.done()  # it waits for the request
        deployment.release(replica, was_served=True)
        await asyncio.wait_for(stopping, LIMIT_S)


async def test_a_stop_of_a_stopped_model_is_done_at_once(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        deployment.stop()
        await stopped(deployment)
        assert deployment.state is State.STOPPED


async def test_a_request_that_comes_while_it_stops_is_served_by_a_new_start(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        replica = await acquire(deployment)
        first = pid_of(replica)
        deployment.stop()
        late = asyncio.create_task(deployment.acquire())
        await until(lambda: deployment.waiting == 1)
        assert deployment.state is State.STOPPING
        deployment.release(replica, was_served=True)
        assert await asyncio.wait_for(late, LIMIT_S) is replica
        assert (replica.starts, deployment.in_flight) == (2, 1)
        assert pid_of(replica) != first


async def test_a_start_that_comes_while_it_stops_loads_again(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"preload": True}) as deployment:
        await until(lambda: deployment.state is State.READY)
        deployment.stop()
        deployment.start()
        await until(lambda: deployment.replicas[0].starts == 2 and deployment.state is State.READY)


@pytest.mark.parametrize("turns", range(8))
async def test_a_stop_at_any_moment_of_a_start_wins(turns: int, tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        await asyncio.sleep(0.05)  # it waits for somebody to ask
        deployment.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        deployment.stop()
        await stopped(deployment)
        await asyncio.sleep(0.3)
        assert deployment.state is State.STOPPED


async def test_a_stop_for_good_is_told_to_who_waits_and_to_who_comes_later(tmp_path: Path) -> None:
    async with deployed(tmp_path, never_ready=True) as deployment:
        waiters = [asyncio.create_task(deployment.acquire()) for _ in range(3)]
        await until(lambda: deployment.state is State.STARTING)
        await asyncio.wait_for(deployment.close(force=True), LIMIT_S)
        ends = await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), LIMIT_S)
        assert [type(end) for end in ends] == [ShuttingDown] * 3
        with pytest.raises(ShuttingDown, match="fake is being stopped for good"):
            await acquire(deployment)
        assert (deployment.state, deployment.waiting) == (State.STOPPED, 0)


async def test_a_cancel_of_the_run_ends_the_engine(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        pid = pid_of(await acquire(deployment))
    assert not psutil.pid_exists(pid)


# --- failing


async def test_a_model_that_does_not_start_says_why_and_what_to_do(tmp_path: Path) -> None:
    async with deployed(tmp_path, restart_limit=1, exit_at_start=3) as deployment:
        with pytest.raises(ModelFailed) as caught:
            await acquire(deployment)
        words = ["'fake' does not start", "exit code 3", "error loading model", "hostler start fake"]
        assert [word for word in words if word not in caught.value.message] == []
        assert (deployment.state, deployment.has_failed, deployment.waiting) == (State.FAILED, True, 0)


async def test_a_failed_model_refuses_at_once_and_is_not_tried_again_by_itself(tmp_path: Path) -> None:
    async with deployed(tmp_path, restart_limit=1, exit_at_start=3) as deployment:
        for _ in range(3):
            with pytest.raises(ModelFailed):
                await acquire(deployment)
        assert deployment.replicas[0].starts == 1


async def test_a_start_gives_a_failed_model_another_chance(tmp_path: Path) -> None:
    behaviour = {"exit_before_ready_times": 1, "counter_file": str(tmp_path / "starts")}
    async with deployed(tmp_path, restart_limit=1, **behaviour) as deployment:
        with pytest.raises(ModelFailed):
            await acquire(deployment)
        deployment.start()
        await until(lambda: deployment.state is State.READY)
        assert deployment.is_settled
        assert (await acquire(deployment)).starts == 2


async def test_a_start_and_a_request_at_once_are_another_chance_too(tmp_path: Path) -> None:
    behaviour = {"exit_before_ready_times": 1, "counter_file": str(tmp_path / "starts")}
    async with deployed(tmp_path, restart_limit=1, **behaviour) as deployment:
        with pytest.raises(ModelFailed):
            await acquire(deployment)
        deployment.start()
        assert (await acquire(deployment)).starts == 2


async def test_a_stop_clears_a_failure_too(tmp_path: Path) -> None:
    behaviour = {"exit_before_ready_times": 1, "counter_file": str(tmp_path / "starts")}
    async with deployed(tmp_path, restart_limit=1, **behaviour) as deployment:
        with pytest.raises(ModelFailed):
            await acquire(deployment)
        deployment.stop()
        await stopped(deployment)
        assert (deployment.state, deployment.has_failed) == (State.STOPPED, False)
        assert (await acquire(deployment)).starts == 2


async def test_a_model_that_starts_at_the_second_try_serves_who_waits(tmp_path: Path) -> None:
    behaviour = {"exit_before_ready_times": 1, "counter_file": str(tmp_path / "starts")}
    async with deployed(tmp_path, restart_limit=2, **behaviour) as deployment:
        replica = await acquire(deployment)
        assert replica.starts == 2
        assert replica.failure is not None
        assert replica.failure.exit_code == 1


async def test_an_engine_that_dies_is_left_at_once_and_started_again(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        replica = await acquire(deployment)
        deployment.release(replica, was_served=True)
        os.kill(pid_of(replica), signal.SIGKILL)
        await until(lambda: replica.failure)
        assert replica.failure is not None
        assert (replica.failure.signal, replica.failure.exit_code) == (9, None)
        assert replica.failure.cause == Cause.KILLED
        assert replica.upstream is None
        assert (await acquire(deployment)).starts == 2


async def test_failures_in_a_row_are_forgotten_once_a_request_was_served(tmp_path: Path) -> None:
    async with deployed(tmp_path, restart_limit=2) as deployment:
        for life in range(1, 4):
            replica = await acquire(deployment)
            assert replica.starts == life
            deployment.release(replica, was_served=True)
            os.kill(pid_of(replica), signal.SIGKILL)
            await until(lambda replica=replica: replica.state is not State.READY)
        assert replica.failures_in_row == 1


async def test_an_engine_that_is_never_ready_fails_when_its_time_is_over(tmp_path: Path) -> None:
    fields = {"start_timeout_s": 0.3}
    async with deployed(tmp_path, restart_limit=1, never_ready=True, fields=fields) as deployment:
        with pytest.raises(ModelFailed, match=r"not ready 0\.3 s after its start.*start_timeout_s"):
            await acquire(deployment)
        assert deployment.replicas[0].process is None


async def test_a_model_without_its_files_fails_for_good_at_the_first_try(tmp_path: Path) -> None:
    async with deployed(tmp_path, model="n.gguf") as deployment:
        with pytest.raises(ModelFailed, match=r"its files cannot be had: .*Did you mean 'm\.gguf'"):
            await acquire(deployment)
        assert deployment.replicas[0].starts == 0


async def test_a_model_that_cannot_be_placed_fails_for_good_at_the_first_try(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"gpu_idx": (4096,)}) as deployment:
        with pytest.raises(ModelFailed, match="it cannot be placed: it asks for GPU 4096"):
            await acquire(deployment)
        assert deployment.replicas[0].starts == 0


async def test_waiters_are_woken_by_every_change_and_by_their_limit(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        started = time.monotonic()
        await deployment.changed(limit_s=0.05)
        assert time.monotonic() - started < LIMIT_S
        waiting = [asyncio.create_task(deployment.changed()) for _ in range(3)]
        await asyncio.sleep(0)
        deployment.notify()
        await asyncio.wait_for(asyncio.gather(*waiting), LIMIT_S)


# --- replicas that come and go


async def test_a_model_whose_only_replica_was_removed_is_stopped_like_any_other(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"preload": True}) as deployment:
        await until(lambda: deployment.state is State.READY)
        (only,) = deployment.replicas
        await deployment.remove(only)
        assert (deployment.staying, deployment.pick(), deployment.has_failed) == ([], None, False)
        deployment.stop()
        await stopped(deployment)
        deployment.add(only)
        assert await acquire(deployment) is only


async def test_who_waits_gets_the_replica_that_comes(tmp_path: Path) -> None:
    async with deployed(tmp_path, fields={"preload": True}) as deployment:
        await until(lambda: deployment.state is State.READY)
        (only,) = deployment.replicas
        await deployment.remove(only)
        waiter = asyncio.create_task(acquire(deployment))
        await asyncio.sleep(0.1)
        deployment.add(only)
        assert await waiter is only


async def test_one_that_is_removed_in_the_middle_of_its_start_leaves_no_process(tmp_path: Path) -> None:
    async with deployed(tmp_path, replica=2, never_ready=True, fields={"preload": True}) as deployment:
        await until(lambda: all(replica.process for replica in deployment.replicas))
        one, other = deployment.replicas
        pid = pid_of(one)
        await asyncio.wait_for(deployment.remove(one), LIMIT_S)
        assert not psutil.pid_exists(pid)
        assert list(deployment.replicas) == [other]
        await asyncio.wait_for(deployment.remove(one), LIMIT_S)  # twice is harmless


async def test_removing_and_stopping_at_once_ends_both(tmp_path: Path) -> None:
    async with deployed(tmp_path, replica=2, fields={"preload": True}) as deployment:
        await until(lambda: all(replica.state is State.READY for replica in deployment.replicas))
        one, other = deployment.replicas
        deployment.take(one)
        removing = asyncio.create_task(deployment.remove(one, 0.2))
        await asyncio.sleep(0)
        assert deployment.pick() is other
        deployment.stop()
        await stopped(deployment)
        await asyncio.wait_for(removing, LIMIT_S)
        assert list(deployment.replicas) == [other]
        deployment.release(one, was_served=True)
        assert await acquire(deployment) is other
