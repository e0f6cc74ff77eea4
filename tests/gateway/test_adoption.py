"""Engines outlive their gateway, on purpose and safely: the next one goes on with them, or ends them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import FAKE_ENGINE, Gateway, StartGateway, events_in, fake_model, is_running, until

from gateway.home import only_one_in
from gateway.keeper import started_of
from gateway.lives import lock_path

KEEP = {"HOSTLER_ON_EXIT": "keep", "HOSTLER_ORPHAN_TIMEOUT_S": "60"}
SHORT = {"HOSTLER_ON_EXIT": "keep", "HOSTLER_ORPHAN_TIMEOUT_S": "1"}
ENDINGS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]


async def engine_of(gateway: Gateway) -> int:
    pid: int = (await gateway.until(state="ready"))["pid"]
    return pid


def keeper_of(gateway: Gateway, engine: int) -> int:
    """As its folder says; the keeper need not be a child of this gateway."""
    for path in (gateway.home / "run").glob("*/started.json"):
        started = json.loads(path.read_text())
        if started["engine"][0] == engine:
            pid: int = started["keeper"][0]
            return pid
    raise AssertionError(f"no keeper of {engine}")


def folders(gateway: Gateway) -> list[Path]:
    return [path for path in (gateway.home / "run").iterdir() if path.is_dir()]


async def events_of(gateway: Gateway, uid: str = "fake") -> str:
    return str((await gateway.get(f"/v1/models/{uid}/events")).json)


# --- the next gateway goes on with them


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
async def test_a_ready_engine_is_adopted_and_the_first_request_loads_nothing(
    start_gateway: StartGateway, tmp_path: Path, ending: int
) -> None:
    events = tmp_path / "events"
    fake = {"ready_after_s": 0.3, "events_file": str(events)}
    gateway = await start_gateway(fake=fake, env=KEEP)
    assert (await gateway.complete()).status == 200
    engine = await engine_of(gateway)
    await gateway.end(ending)
    assert is_running(engine)
    gateway = await start_gateway(fake=fake, home=gateway.home)
    answer = await asyncio.wait_for(gateway.complete(), 1)
    assert answer.status == 200
    assert await engine_of(gateway) == engine
    assert len(events_in(events, "start")) == 1
    assert "ran on meanwhile" in await events_of(gateway)
    metrics = (await gateway.get("/metrics")).body.decode()
    assert 'hostler_engine_adoptions_total{model="fake"} 1' in metrics
    assert 'hostler_model_load_seconds_count{model="fake"}' not in metrics
    await gateway.end()
    await until(lambda: not is_running(engine))
    assert folders(gateway) == []


async def test_an_engine_that_is_still_starting_is_adopted_and_waited_for(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    fake = {"ready_after_s": 3, "events_file": str(events)}
    gateway = await start_gateway(fake=fake, model={"preload": True}, env=KEEP)
    await gateway.until(state="starting")
    await until(lambda: events_in(events, "start"))
    engine = (await gateway.until(state="starting"))["pid"]
    await gateway.end(signal.SIGKILL)
    gateway = await start_gateway(fake=fake, model={"preload": True}, home=gateway.home)
    assert (await gateway.complete()).status == 200
    assert await engine_of(gateway) == engine
    assert len(events_in(events, "start")) == 1


async def test_each_replica_gets_its_own_engine_back_and_one_that_is_gone_is_started(
    start_gateway: StartGateway,
) -> None:
    model = {"replica": 3, "preload": True}
    gateway = await start_gateway(fake={}, model=model, env=KEEP)

    async def pids(gateway: Gateway) -> dict[int, int]:
        async with asyncio.timeout(20):
            while any(replica["state"] != "ready" for replica in await gateway.replicas()):
                await asyncio.sleep(0.05)
        return {replica["replica"]: replica["pid"] for replica in await gateway.replicas()}

    before = await pids(gateway)
    await gateway.end(signal.SIGKILL)
    os.kill(before[1], signal.SIGKILL)
    await until(lambda: not is_running(before[1]))
    gateway = await start_gateway(fake={}, model=model, home=gateway.home)
    after = await pids(gateway)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]


async def test_an_engine_with_less_memory_than_wished_is_adopted_each_time_and_still_told_so(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    fake = {"memory_for_tokens": 4096, "events_file": str(events)}
    gateway = await start_gateway(fake=fake, env=KEEP)
    assert (await gateway.complete()).status == 200
    before = await gateway.until(state="ready")
    assert "context 2048 instead of 4096" in before["degraded"]
    for ending in (signal.SIGTERM, signal.SIGKILL):
        await gateway.end(ending)
        gateway = await start_gateway(fake=fake, home=gateway.home, env=KEEP)
        assert (await gateway.complete()).status == 200
        after = await gateway.until(state="ready")
        assert (after["pid"], after["degraded"]) == (before["pid"], before["degraded"])
        assert "ran on meanwhile, with 1 slot instead of 4" in await events_of(gateway)
    assert len(events_in(events, "start")) == 2  # the whole wish, and what is adopted
    assert (await gateway.post("/v1/models/fake/stop")).status == 200
    await gateway.until(state="stopped", degraded=None)


async def test_an_engine_with_less_memory_is_started_anew_if_the_wish_has_changed(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    fake = {"memory_for_tokens": 4096, "events_file": str(events)}
    gateway = await start_gateway(fake=fake, env=KEEP)
    assert (await gateway.complete()).status == 200
    await gateway.end(signal.SIGKILL)
    lighter = {"options": {"n_parallel": 2}}
    gateway = await start_gateway(fake=fake, model=lighter, home=gateway.home, env=KEEP)
    assert (await gateway.complete()).status == 200
    contexts = [start["argv"][start["argv"].index("--ctx-size") + 1] for start in events_in(events, "start")]
    assert contexts == ["16384", "2048", "8192", "4096"]


async def test_an_engine_that_runs_just_what_is_wished_by_now_is_adopted_as_whole(start_gateway: StartGateway) -> None:
    fake = {"memory_for_tokens": 4096}
    gateway = await start_gateway(fake=fake, env=KEEP)
    assert (await gateway.complete()).status == 200
    engine = await engine_of(gateway)
    await gateway.end(signal.SIGKILL)
    model = {"options": {"n_parallel": 1, "context_length": 2048, "cache_ram_mib": 0}}
    gateway = await start_gateway(fake=fake, model=model, home=gateway.home)
    assert (await gateway.complete()).status == 200
    replica = await gateway.until(state="ready")
    assert (replica["pid"], replica["degraded"]) == (engine, None)


async def test_an_adopted_engine_that_dies_is_told_of_with_its_signal_and_started_again(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, env=KEEP)
    engine = await engine_of(gateway)
    await gateway.end(signal.SIGKILL)
    gateway = await start_gateway(fake={}, model={"preload": True}, home=gateway.home)
    assert await engine_of(gateway) == engine
    os.kill(engine, signal.SIGSEGV)
    back = await gateway.until(state="ready", starts=2)
    assert "signal 11 (SIGSEGV)" in back["failure"]["reason"]
    assert back["failure"]["log_tail"]


async def test_an_adopted_engine_is_stopped_as_any_other(start_gateway: StartGateway, tmp_path: Path) -> None:
    grandchildren = tmp_path / "grandchildren"
    fake = {"grandchild": True, "grandchild_file": str(grandchildren)}
    gateway = await start_gateway(fake=fake, model={"preload": True}, env=KEEP)
    engine = await engine_of(gateway)
    pids = [engine, keeper_of(gateway, engine), *json.loads(grandchildren.read_text())]
    await gateway.end(signal.SIGTERM)
    assert all(map(is_running, pids))
    gateway = await start_gateway(fake=fake, home=gateway.home)
    assert await engine_of(gateway) == engine
    assert (await gateway.post("/v1/models/fake/stop")).status == 200
    assert not any(map(is_running, pids))
    assert folders(gateway) == []


async def test_an_engine_that_was_being_stopped_is_not_gone_on_with(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ignore_term": True}, model={"preload": True}, env=KEEP)
    engine = await engine_of(gateway)
    stopping = asyncio.create_task(gateway.post("/v1/models/fake/stop"))
    await gateway.until(state="stopping")
    await asyncio.sleep(0.2)
    await gateway.end(signal.SIGKILL)
    await asyncio.gather(stopping, return_exceptions=True)
    gateway = await start_gateway(fake={"ignore_term": True}, home=gateway.home)
    await until(lambda: not is_running(engine))
    assert (await gateway.until())["state"] == "stopped"


# --- or ends them


@pytest.mark.parametrize("change", ["options", "program", "gone", "fewer"])
async def test_an_engine_that_is_not_what_would_be_started_now_is_ended(
    start_gateway: StartGateway, tmp_path: Path, change: str
) -> None:
    models: dict[str, Any] = {"model": {"preload": True, "replica": 2, "model_engine": "llama.cpp"}}
    gateway = await start_gateway(fake={}, env=KEEP, **models)
    await gateway.until(state="ready")
    async with asyncio.timeout(20):
        while any(replica["state"] != "ready" for replica in await gateway.replicas()):
            await asyncio.sleep(0.05)
    before = [replica["pid"] for replica in await gateway.replicas()]
    await gateway.end(signal.SIGKILL)
    fake: dict[str, Any] | None = {}
    if change == "options":
        models["model"]["options"] = {"context_length": 77}
    elif change == "program":
        fake = {"tokens": 3}
    elif change == "gone":
        fake = None
    else:
        models["model"]["replica"] = 1
    gateway = await start_gateway(fake=fake, home=gateway.home, **models)
    ended = before[1:] if change == "fewer" else before
    await until(lambda: not any(map(is_running, ended)))
    if change == "fewer":
        assert await engine_of(gateway) == before[0]
    elif fake is not None:
        assert await engine_of(gateway) not in before
        assert (await gateway.complete()).status == 200


async def test_an_engine_whose_model_is_no_longer_there_is_ended(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(env=KEEP)
    (file := tmp_path / "of_its_own.gguf").write_bytes(b"GGUF")
    launch = fake_model(file, {}) | {"model_uid": "fake"}
    assert (await gateway.post("/v1/models", launch)).status == 200
    engine = await engine_of(gateway)
    await gateway.end(signal.SIGKILL)
    file.unlink()
    gateway = await start_gateway(home=gateway.home)
    await gateway.until(state="failed")
    await until(lambda: not is_running(engine))
    await until(lambda: not folders(gateway))


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
async def test_engines_whose_gateway_is_gone_for_too_long_end_and_leave_nothing(
    start_gateway: StartGateway, tmp_path: Path, ending: int
) -> None:
    grandchildren = tmp_path / "grandchildren"
    fake = {"grandchild": True, "grandchild_file": str(grandchildren)}
    gateway = await start_gateway(fake=fake, model={"preload": True}, env=SHORT)
    engine = await engine_of(gateway)
    pids = [engine, keeper_of(gateway, engine), *json.loads(grandchildren.read_text())]
    await gateway.end(ending)
    await until(lambda: not any(map(is_running, pids)), limit_s=20)  # one of them is deaf, for its grace
    await until(lambda: folders(gateway) == [])


async def test_stop_is_stop(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, env={"HOSTLER_ON_EXIT": "stop"})
    engine = await engine_of(gateway)
    keeper = keeper_of(gateway, engine)
    await gateway.end(signal.SIGTERM)
    assert not is_running(engine)
    assert not is_running(keeper)
    assert folders(gateway) == []


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("has_terminal", [True, False])
async def test_unless_the_settings_say_it_a_terminal_decides(
    tmp_path: Path, has_terminal: bool, is_restarted: bool
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    model = fake_model(tmp_path / "m.gguf", {}) | {"preload": True}
    settings = {"engines": {"llama.cpp": {"binary": str(FAKE_ENGINE)}}, "models": {"fake": model}}
    terminal, other_end = os.openpty()
    try:
        env = {"HOSTLER_ON_EXIT": ""}
        gateway = await Gateway.start(tmp_path / "home", settings, env, other_end if has_terminal else None)
        engine = await engine_of(gateway)
        if is_restarted:
            assert (await gateway.post("/v1/restart")).status == 200
        await gateway.end(signal.SIGTERM)
        assert is_running(engine) is not has_terminal
        await until(lambda: not is_running(engine))  # at the latest as an orphan
    finally:
        os.close(terminal)
        os.close(other_end)


async def test_a_second_gateway_on_one_data_folder_is_refused_and_the_first_goes_on(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, watch_settings=False)
    engine = await engine_of(gateway)
    with pytest.raises(AssertionError, match=rf"Another gateway \(pid {gateway.process.pid}\)"):
        await Gateway.start(gateway.home, {})
    assert await engine_of(gateway) == engine
    assert (await gateway.complete()).status == 200


def test_the_look_of_keepers_at_the_lock_keeps_no_gateway_out(tmp_path: Path) -> None:
    """Each holds it for an instant, each second; here it is held for longer than one look takes."""
    holder = lock_path(tmp_path).open("a")
    fcntl.flock(holder, fcntl.LOCK_SH)
    threading.Timer(0.1, holder.close).start()
    with only_one_in(tmp_path):
        assert lock_path(tmp_path).read_text() == str(os.getpid())


async def test_engines_of_a_removed_data_folder_end(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, env=KEEP)
    engine = await engine_of(gateway)
    await gateway.end(signal.SIGKILL)
    for folder in folders(gateway):
        folder.rename(gateway.home / "elsewhere")
    await until(lambda: not is_running(engine))


# --- killed keepers


async def test_a_keeper_that_is_killed_takes_its_engine_along_and_it_is_started_again(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    grandchildren = tmp_path / "grandchildren"
    fake = {"grandchild": True, "grandchild_file": str(grandchildren)}
    gateway = await start_gateway(fake=fake, model={"preload": True})
    engine = await engine_of(gateway)
    pids = [engine, *json.loads(grandchildren.read_text())]
    os.kill(keeper_of(gateway, engine), signal.SIGKILL)
    back = await gateway.until(state="ready", starts=2)
    assert back["pid"] != engine
    assert "its keeper was killed" in back["failure"]["reason"]
    assert not any(map(is_running, pids))
    assert len(folders(gateway)) == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux ends a child with its parent")
async def test_a_keeper_that_is_killed_with_its_gateway_leaves_no_engine_and_the_next_start_no_grandchild(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    grandchildren = tmp_path / "grandchildren"
    fake = {"grandchild": True, "grandchild_file": str(grandchildren)}
    gateway = await start_gateway(fake=fake, model={"preload": True}, env=KEEP)
    engine = await engine_of(gateway)
    keeper = keeper_of(gateway, engine)
    gateway.process.kill()
    os.kill(keeper, signal.SIGKILL)
    await gateway.end(signal.SIGKILL)
    await until(lambda: not is_running(engine))
    gateway = await start_gateway(fake=fake, home=gateway.home)
    await until(lambda: not any(map(is_running, json.loads(grandchildren.read_text()))))
    assert (await gateway.until())["state"] == "stopped"


async def test_a_keeper_is_small_in_a_session_of_its_own_and_has_none_of_our_settings(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, env={"HOSTLER_API_KEY": ""})
    engine = await engine_of(gateway)
    keeper = psutil.Process(keeper_of(gateway, engine))
    assert os.getsid(keeper.pid) == keeper.pid
    assert psutil.Process(engine).ppid() == keeper.pid
    assert not [name for name in keeper.environ() if name.startswith("HOSTLER_")]
    assert keeper.memory_info().rss < 16 * 2**20
    assert keeper.num_fds() < 8


# --- whom a record is believed


async def test_a_record_whose_pid_belongs_to_another_process_now_ends_nobody(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, env=KEEP)
    engine = await engine_of(gateway)
    await gateway.end(signal.SIGKILL)
    (folder,) = folders(gateway)
    bystander = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        record = folder / "started.json"
        started = json.loads(record.read_text())
        os.kill(started["keeper"][0], signal.SIGKILL)
        await until(lambda: not is_running(engine))
        # The pids were given to somebody else, who was started at another time.
        record.write_text(json.dumps({"keeper": [bystander.pid, "x 1"], "engine": [bystander.pid, "x 1"]}))
        gateway = await start_gateway(fake={}, model={"preload": True}, home=gateway.home)
        assert await engine_of(gateway) not in (engine, bystander.pid)
        await until(lambda: not folder.exists())
        assert bystander.returncode is None
        assert started_of(bystander.pid)
    finally:
        bystander.kill()
        await bystander.wait()


@pytest.mark.parametrize("damage", ["life.json", "started.json"])
async def test_a_record_that_cannot_be_read_costs_the_engine_and_nothing_else(
    start_gateway: StartGateway, damage: str
) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, env=KEEP)
    engine = await engine_of(gateway)
    await gateway.end(signal.SIGKILL)
    (folder,) = folders(gateway)
    (folder / damage).write_text("{")
    gateway = await start_gateway(fake={}, model={"preload": True}, home=gateway.home)
    assert await engine_of(gateway) != engine
    await until(lambda: not is_running(engine))


async def test_keys_of_engines_are_for_their_owner_alone(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    await gateway.until(state="ready")
    (folder,) = folders(gateway)
    for path in (folder.parent, folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in ("life.json", "started.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("what", ["open", "link", "file"])
async def test_a_run_folder_that_others_could_have_made_is_refused(tmp_path: Path, what: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run = home / "run"
    if what == "open":
        run.mkdir()
        run.chmod(0o777)
    elif what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        run.symlink_to(tmp_path / "elsewhere")
    else:
        run.touch()
    with pytest.raises(AssertionError, match=r"keys of engines are kept.*Remove it"):
        await Gateway.start(home, {})


async def test_a_data_folder_with_a_long_path_has_its_sockets_in_a_folder_of_tmp(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    home = tmp_path / ("long" * 25)
    gateway = await start_gateway(fake={}, model={"preload": True}, home=home, env=KEEP)
    replica = await gateway.until(state="ready")
    folder = Path(replica["address"].removeprefix("unix:")).parent.parent
    assert folder.parent == Path("/tmp").resolve()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    await gateway.end(signal.SIGKILL)
    gateway = await start_gateway(fake={}, home=home)
    assert await engine_of(gateway) == replica["pid"]
    await gateway.end()
    assert list(folder.glob("*/")) == []
    (folder / "orphan_timeout_s").unlink()
    folder.rmdir()
