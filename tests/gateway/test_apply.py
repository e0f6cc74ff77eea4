"""Settings are taken up while models are served: only what is other than before is touched."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from harness import FAKE_ENGINE, Gateway, StartGateway, fake_model, is_running

LIMIT_S = 30.0


def model(folder: Path, fake: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return fake_model(folder / "fake.gguf", fake or {}) | fields


def settings_of(gateway: Gateway) -> dict[str, Any]:
    return dict(yaml.safe_load((gateway.home / "settings.yaml").read_text()))


def save(gateway: Gateway, settings: dict[str, Any]) -> None:
    """As editors do: a new file in the place of the old."""
    new = gateway.home / "settings.new"
    new.write_text(yaml.safe_dump(settings, sort_keys=False))
    new.replace(gateway.home / "settings.yaml")


async def until(condition: Callable[[], Awaitable[Any]], limit_s: float = LIMIT_S) -> Any:
    async with asyncio.timeout(limit_s):
        while not (value := await condition()):
            await asyncio.sleep(0.03)
        return value


async def taken_up(gateway: Gateway, after: float = 0) -> dict[str, Any]:
    """What came of the next time that the settings were read."""

    async def told() -> dict[str, Any] | None:
        found = (await gateway.get("/v1/config")).json["taken_up"]
        return found if found and found["at"] > after else None

    return dict(await until(told))


async def steps(gateway: Gateway, body: dict[str, Any] | None = None) -> dict[str, str]:
    answer = await gateway.post("/v1/config/apply", body or {})
    assert answer.status == 200, answer.body
    return {step["uid"]: step["step"] for step in answer.json["models"]}


async def pids(gateway: Gateway) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for replica in await gateway.replicas():
        found.setdefault(replica["uid"], []).append(replica["pid"])
    return found


async def all_ready(gateway: Gateway) -> bool:
    return all(replica["state"] == "ready" for replica in await gateway.replicas())


async def test_a_change_while_16_streams_run_touches_only_what_changed(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    slow = {"tokens": 120, "token_delay_s": 0.03}
    models = {name: model(tmp_path, slow, preload=True) for name in ("kept", "tuned", "changed", "gone")}
    models["changed"]["options"] = {"n_threads": 1}
    models["scaled"] = model(tmp_path, slow, preload=True)
    gateway = await start_gateway(models=models)
    await until(lambda: all_ready(gateway))
    before = await pids(gateway)
    names = ("kept", "tuned", "changed", "gone")
    streams = [asyncio.create_task(gateway.stream(name)) for name in names for _ in range(4)]

    async def all_flow() -> bool:
        return sum(replica["in_flight"] for replica in await gateway.replicas()) == 16

    await until(all_flow)
    wanted = settings_of(gateway)
    del wanted["models"]["gone"]
    wanted["models"]["changed"]["options"] = {"n_threads": 2}
    wanted["models"]["tuned"] |= {"request_limits": 9, "idle_timeout_s": 600}
    wanted["models"]["scaled"]["replica"] = 2
    wanted["models"]["new"] = model(tmp_path, preload=True)
    save(gateway, wanted)
    gateway.process.send_signal(signal.SIGHUP)
    assert (await taken_up(gateway))["error"] is None

    lines = await asyncio.gather(*streams)
    assert all(one[-1] == "data: [DONE]" and len(one) > 120 for one in lines)
    await until(lambda: all_ready(gateway))
    after = await pids(gateway)
    assert set(after) == {"kept", "tuned", "changed", "scaled", "new"}
    assert (after["kept"], after["tuned"]) == (before["kept"], before["tuned"])
    assert set(before["scaled"]) < set(after["scaled"])
    assert len(after["scaled"]) == 2
    assert not set(after["changed"]) & set(before["changed"])
    assert not is_running(before["gone"][0])
    assert (await gateway.complete("gone")).status == 404
    for name in after:
        assert (await gateway.complete(name)).status == 200
    assert set((await steps(gateway)).values()) == {"untouched"}
    reload = (await gateway.get("/v1/models/changed/reload")).json
    assert (reload["status"], reload["error"]) == ("ready", None)
    assert (await gateway.get("/v1/models/tuned/reload")).status == 404


async def test_the_answer_says_what_each_field_would_take_and_a_dry_run_does_nothing(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    models = {"m": model(tmp_path, preload=True), "out": model(tmp_path)}
    gateway = await start_gateway(models=models, env={"HOSTLER_ORPHAN_TIMEOUT_S": ""})  # else it goes before the file
    await until(lambda: all_of(gateway, "m"))
    before = await pids(gateway)
    wanted = settings_of(gateway) | {"port": 1, "drain_timeout_s": 3, "orphan_timeout_s": 7, "watch_settings": False}
    wanted["models"] = {"m": model(tmp_path, {"tokens": 3}, options={"n_threads": 2}), "in": model(tmp_path)}
    wanted["models"]["m"]["envs"]["HF_TOKEN"] = "hf_secret"
    wanted["models"]["m"]["pinned"] = True
    # The harness says --port, which goes before the file.
    (gateway.home / "settings.yaml").write_text(yaml.safe_dump(wanted))
    answer = await gateway.post("/v1/config/apply", {"dry_run": True})
    assert "hf_secret" not in answer.body.decode()
    told = answer.json
    assert told["dry_run"] is True
    assert {step["uid"]: step["step"] for step in told["models"]} == {
        "out": "removed",
        "m": "copies started anew, one after the other",
        "in": "added",
    }
    fields = next(step["fields"] for step in told["models"] if step["uid"] == "m")
    assert {field["name"]: (field["before"], field["after"]) for field in fields} == {
        "preload": (True, False),
        "pinned": (False, True),
        "options.n_threads": (None, 2),
        "envs.FAKE_ENGINE": ("******", "******"),
        "envs.HF_TOKEN": (None, "******"),
    }
    assert {step["name"]: step["takes_effect"] for step in told["settings"]} == {
        "drain_timeout_s": "at once",
        "watch_settings": "at once",
        "orphan_timeout_s": "at once",
    }
    assert {card["id"] for card in (await gateway.get("/v1/models")).json["data"]} == {"m", "out"}
    assert await pids(gateway) == before


async def all_of(gateway: Gateway, uid: str) -> bool:
    return {one["state"] for one in await gateway.replicas() if one["uid"] == uid} == {"ready"}


async def test_a_saved_file_is_seen(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(models={"a": model(tmp_path)})
    save(gateway, settings_of(gateway) | {"models": {"b": model(tmp_path)}})
    assert "b added" in (await taken_up(gateway))["steps"]
    assert [card["id"] for card in (await gateway.get("/v1/models")).json["data"]] == ["b"]


async def test_links_that_are_moved_are_seen_as_kubernetes_does_it(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(models={"a": model(tmp_path)})
    settings, first = settings_of(gateway), gateway.home / "..1"
    file = gateway.home / "settings.yaml"
    first.mkdir()
    file.replace(first / "settings.yaml")
    (gateway.home / "..data").symlink_to("..1")
    file.symlink_to("..data/settings.yaml")
    second = gateway.home / "..2"
    second.mkdir()
    (second / "settings.yaml").write_text(yaml.safe_dump(settings | {"models": {"b": model(tmp_path)}}))
    (gateway.home / "..new").symlink_to("..2")
    (gateway.home / "..new").rename(gateway.home / "..data")
    assert "b added" in (await taken_up(gateway))["steps"]


async def test_a_file_that_is_written_bit_by_bit_is_read_once_it_is_whole(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(models={"a": model(tmp_path)})
    text = yaml.safe_dump(settings_of(gateway) | {"models": {"b": model(tmp_path), "c": model(tmp_path)}})
    size = len(text) // 10
    with (gateway.home / "settings.yaml").open("w") as file:
        for begin in range(0, len(text), size):
            file.write(text[begin : begin + size])
            file.flush()
            await asyncio.sleep(0.3)
    told = await taken_up(gateway)
    assert told["error"] is None
    assert "b added; c added" in told["steps"]
    assert "stay as they were" not in gateway.log.read_text()


BAD = (
    ("models: [", "is not valid YAML"),
    ("modles: {}", "Did you mean 'models'"),
    ("models: {m: {model_path: /x/y.gguf, options: {n_thread: 1}}}", "n_threads"),
    ("models: {m: {model_name: no-such-model}}", "No model is named 'no-such-model'"),
    ("models: {}\nlog_level: loud", "$.log_level"),
    ("models: {}\napi_keys: ['${NOT_SET_ANYWHERE}']", "NOT_SET_ANYWHERE"),
    ("models: {}\nengines: {no-such: {}}", "$.engines"),
    ("models: {}\ncatalogue_files: [/no/such/file.json]", "$.catalogue_files"),
)


async def test_a_bad_file_changes_nothing(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, watch_settings=False)
    await gateway.until(state="ready")
    before = await pids(gateway)
    for text, said in BAD:
        (gateway.home / "settings.yaml").write_text(text)
        for dry_run in (True, False):
            refused = await gateway.post("/v1/config/apply", {"dry_run": dry_run})
            assert refused.status == 400
            assert said in refused.error["message"]
        assert said in (await gateway.get("/v1/config")).json["taken_up"]["error"]
    assert await pids(gateway) == before
    assert (await gateway.complete()).status == 200


async def test_a_bad_file_is_told_once_and_a_good_one_mends_it(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    await gateway.until(state="ready")
    before = await pids(gateway)
    whole = (gateway.home / "settings.yaml").read_text()
    (gateway.home / "settings.yaml").write_text("models: [")
    told = await taken_up(gateway)
    assert "is not valid YAML" in told["error"]
    await asyncio.sleep(2.5)
    assert gateway.log.read_text().count("The settings stay as they were.") == 1
    (gateway.home / "settings.yaml").write_text(whole)
    assert (await taken_up(gateway, told["at"]))["error"] is None
    assert await pids(gateway) == before


async def test_settings_of_the_site_take_effect_at_once(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={}, access_log=True)
    page = {"origin": "https://a.example"}
    assert (await gateway.get("/v1/models", headers=page)).status == 403
    site = settings_of(gateway) | {"access_log": False, "log_level": "warning", "max_body_bytes": 2048}
    save(gateway, site | {"allowed_origins": ["https://a.example"]})
    assert (await steps(gateway)) == {"fake": "untouched"}
    answer = await gateway.get("/v1/models", headers=page)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
    assert (await gateway.post("/v1/completions", {"model": "fake", "prompt": "x" * 4096})).status == 413
    size = gateway.log.stat().st_size
    assert (await gateway.get("/v1/models")).status == 200
    assert gateway.log.stat().st_size == size
    save(gateway, site | {"api_keys": ["one"]})
    assert (await gateway.post("/v1/config/apply")).status == 200
    assert (await gateway.get("/v1/models")).status == 401
    key = {"authorization": "Bearer one"}
    assert (await gateway.get("/v1/models", headers=key)).status == 200
    save(gateway, site | {"api_keys": ["two"]})
    assert (await gateway.post("/v1/config/apply", headers=key)).status == 200
    assert (await gateway.get("/v1/models", headers=key)).status == 401
    assert (await gateway.get("/v1/models", headers={"authorization": "Bearer two"})).status == 200


async def test_a_drain_that_runs_sees_new_limits_only_at_its_begin(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={"tokens": 400, "token_delay_s": 0.05}, drain_timeout_s=60)
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    save(gateway, settings_of(gateway) | {"drain_timeout_s": 0.5})
    assert (await steps(gateway)) == {"fake": "untouched"}
    async with asyncio.timeout(10):
        await gateway.post("/v1/models/fake/stop")
    await asyncio.gather(stream, return_exceptions=True)


async def test_other_settings_of_an_engine_start_its_models_anew(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    await gateway.until(state="ready")
    before = await pids(gateway)
    other = tmp_path / "other-engine"
    other.symlink_to(FAKE_ENGINE)
    save(gateway, settings_of(gateway) | {"engines": {"llama.cpp": {"binary": str(other)}}})
    assert await steps(gateway) == {"fake": "copies started anew, one after the other"}
    await until(lambda: differs_from(gateway, before))
    assert (await gateway.complete()).status == 200


async def differs_from(gateway: Gateway, before: dict[str, list[int]]) -> bool:
    now = await pids(gateway)
    return await all_ready(gateway) and all(not set(now[uid]) & set(before[uid]) for uid in before)


async def test_a_change_that_does_not_start_leaves_the_model_as_it_was(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    await gateway.until(state="ready")
    wanted = settings_of(gateway)
    wanted["models"]["fake"] = model(tmp_path, {"exit_at_start": 3}, preload=True)
    save(gateway, wanted)
    assert await steps(gateway) == {"fake": "copies started anew, one after the other"}

    async def is_over() -> dict[str, Any] | None:
        status = (await gateway.get("/v1/models/fake/reload")).json
        return status if status["status"] == "error" else None

    assert "fake-rep0 does not start" in (await until(is_over))["error"]
    await gateway.until(state="ready")
    assert (await gateway.complete()).status == 200
    assert await steps(gateway, {"dry_run": True}) == {"fake": "copies started anew, one after the other"}


async def test_what_is_wished_for_during_a_load_or_a_reload_is_what_comes(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 1.5}, model={"preload": True, "replica": 2})
    await gateway.until(state="starting")
    for threads in (1, 2, 3):
        wanted = settings_of(gateway)
        wanted["models"]["fake"]["options"] = {"n_threads": threads}
        save(gateway, wanted)
        assert set((await steps(gateway)).values()) == {"copies started anew, one after the other"}
        await asyncio.sleep(0.4)

    async def is_over() -> bool:
        return (await gateway.get("/v1/models/fake/reload")).json["status"] == "ready"

    await until(is_over)
    assert await flags(gateway) == ["3", "3"]
    assert set((await steps(gateway)).values()) == {"untouched"}


async def flags(gateway: Gateway) -> list[str]:
    found = []
    for replica in await gateway.replicas():
        argv = Path(f"/proc/{replica['pid']}/cmdline").read_text().split("\0")
        found.append(argv[argv.index("--threads") + 1])
    return found


async def test_a_model_that_comes_back_while_it_ends_is_there_afterwards(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={"tokens": 40, "token_delay_s": 0.05}, model={"preload": True})
    await gateway.until(state="ready")
    whole = settings_of(gateway)
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    save(gateway, whole | {"models": {}})
    assert await steps(gateway) == {"fake": "removed"}
    save(gateway, whole)
    assert await steps(gateway) == {"fake": "added"}
    assert await steps(gateway) == {"fake": "untouched"}
    meanwhile = await gateway.complete()
    assert (meanwhile.status, meanwhile.error["code"]) == (503, "model_stopped")
    assert "retry-after" in meanwhile.headers
    assert (await stream)[-1] == "data: [DONE]"
    async with asyncio.timeout(20):
        while (answer := await gateway.complete()).status == 503:
            await asyncio.sleep(0.05)
    assert answer.status == 200


async def test_an_engine_that_is_another_takes_over_without_losing_a_request(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    fake = {"tokens": 20, "token_delay_s": 0.05}
    gateway = await start_gateway(fake=fake, model={"preload": True, "replica": 2})
    await until(lambda: all_ready(gateway))
    streams = [asyncio.create_task(gateway.stream()) for _ in range(4)]
    await asyncio.sleep(0.3)
    wanted = settings_of(gateway)
    argv = [sys.executable, str(FAKE_ENGINE), "--host", "127.0.0.1", "--port", "{port}", "--alias", "{uid}"]
    wanted["models"]["fake"] = {
        "model_name": "fake",
        "model_engine": "command",
        "replica": 2,
        "preload": True,
        "envs": {"FAKE_ENGINE": json.dumps(fake)},
        "options": {"command": argv},
    }
    save(gateway, wanted)
    assert await steps(gateway) == {"fake": "all copies started anew, by another engine"}
    late = asyncio.create_task(gateway.stream())
    assert all(lines[-1] == "data: [DONE]" for lines in await asyncio.gather(*streams, late))
    await until(lambda: all_ready(gateway))
    assert {one["engine"] for one in await gateway.replicas()} == {"command"}


# --- a file that is not the gateway's own


async def test_models_of_another_file_are_kept_and_end_with_it(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    assert (await gateway.post("/v1/models?wait_ready=false", model(tmp_path, model_uid="api"))).status == 200
    models = {"x": model(tmp_path), "y": model(tmp_path, replica=2)}
    assert await steps(gateway, {"settings": {"models": models}}) == {
        "x": "added",
        "y": "added",
        "fake": "untouched",
        "api": "untouched",
    }
    assert await origins(gateway) == {"fake": "settings", "api": "api", "x": "apply", "y": "apply"}
    await gateway.end()
    gateway = await start_gateway(fake={}, home=gateway.home)
    assert await origins(gateway) == {"fake": "settings", "api": "api", "x": "apply", "y": "apply"}
    del models["y"]
    assert await steps(gateway, {"settings": {"models": models}}) == {
        "y": "removed",
        "fake": "untouched",
        "api": "untouched",
        "x": "untouched",
    }
    assert sorted(path.name for path in (gateway.home / "launches").glob("*.json")) == ["api.json", "x.json"]
    # What was launched by hand is taken over by a file that names it, and ends with it.
    assert (await steps(gateway, {"settings": {"models": models | {"api": model(tmp_path, preload=True)}}}))[
        "api"
    ] == "untouched"
    assert (await origins(gateway))["api"] == "apply"
    assert (await steps(gateway, {"settings": {"models": {}}})) == {
        "api": "removed",
        "x": "removed",
        "fake": "untouched",
    }


async def origins(gateway: Gateway) -> dict[str, str]:
    return {card["id"]: card["origin"] for card in (await gateway.get("/v1/models")).json["data"]}


async def test_another_file_may_not_say_what_is_for_the_settings_alone(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={})
    own = settings_of(gateway)["models"]["fake"]
    for models, said in (
        ({"fake": own | {"replica": 2}}, "the gateway's own settings declare 'fake' otherwise"),
        ({"x": model(tmp_path) | {"envs": {"LD_PRELOAD": "/x.so"}}}, "LD_PRELOAD"),
        ({"x": {"model_engine": "command", "options": {"command": ["sh", "{port}"]}}}, "runs any program"),
        ({"x": model(tmp_path, group="none")}, "there is no group 'none'"),
        ({"x": {"model_path": "/no/such/file.gguf"}}, "does not exist"),
        ({"x": {"model_paht": "/x"}}, "Did you mean 'model_path'"),
        ({"bad uid": model(tmp_path)}, "cannot name a model"),
    ):
        answer = await gateway.post("/v1/config/apply", {"settings": {"models": {"ok": model(tmp_path)} | models}})
        assert answer.status == 400, answer.body
        assert answer.error["message"].startswith("Nothing was changed. ")
        assert said in answer.error["message"]
    assert await origins(gateway) == {"fake": "settings"}
    assert not list((gateway.home / "launches").iterdir())
    answer = await gateway.post(
        "/v1/config/apply",
        {"settings": {"allow_command_launches": True, "access_log": True, "models": {"fake": own}}},
    )
    assert answer.json["settings"] == [
        {"name": "allow_command_launches", "takes_effect": "never by this file: it is a setting of the site"}
    ]
    refused = await gateway.post(
        "/v1/models", {"model_uid": "x", "model_engine": "command", "command": ["sh", "{port}"]}
    )
    assert refused.status == 400
    for body in ({"settings": 5}, {"dry-run": True}, {"settings": {"models": {"x": {"options": {"a": "${HOME}"}}}}}):
        assert (await gateway.post("/v1/config/apply", body)).status == 400


async def test_references_in_what_is_sent_are_not_followed_here(start_gateway: StartGateway, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("top secret")
    gateway = await start_gateway(fake={}, env={"ALSO_SECRET": "it is"})
    wish = model(tmp_path, envs={"A": f"${{file:{tmp_path / 'secret'}}}", "B": "${ALSO_SECRET}"})
    assert (await steps(gateway, {"settings": {"models": {"x": wish}}}))["x"] == "added"
    kept = json.loads((gateway.home / "launches" / "x.json").read_text())
    assert kept["envs"] == {"A": f"${{file:{tmp_path / 'secret'}}}", "B": "${ALSO_SECRET}"}


async def test_what_is_declared_covers_a_launch_of_its_name_until_it_is_gone(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(models={})
    whole = settings_of(gateway)
    await gateway.post("/v1/models?wait_ready=false", model(tmp_path, model_uid="m", n_threads=1))
    save(gateway, whole | {"models": {"m": model(tmp_path, options={"n_threads": 2}, preload=True)}})
    assert await steps(gateway) == {"m": "copies started anew, one after the other"}
    assert await origins(gateway) == {"m": "settings"}
    save(gateway, whole)
    assert await steps(gateway) == {"m": "copies started anew, one after the other"}
    assert await origins(gateway) == {"m": "api"}

    async def is_back() -> bool:
        return await all_ready(gateway) and await flags(gateway) == ["1"]

    await until(is_back)


async def test_many_at_once_are_done_one_after_the_other(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    files = [
        {"settings": {"models": {f"m{n}": model(tmp_path), "all": model(tmp_path, request_limits=n)}}}
        for n in range(12)
    ]
    answers = await asyncio.gather(*(gateway.post("/v1/config/apply", file) for file in files))
    assert {answer.status for answer in answers} == {200}
    launches = [json.loads(path.read_text()) for path in (gateway.home / "launches").glob("*.json")]
    by_uid = {launch["uid"]: launch for launch in launches}
    assert len(by_uid) == 2
    (last,) = by_uid.keys() - {"all"}
    assert by_uid["all"]["request_limits"] == int(last[1:])
    served = await origins(gateway)
    assert served.keys() == {"fake", "all", last}


async def test_a_gateway_that_is_killed_in_the_midst_has_all_of_a_file_or_nothing(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    sets = [{f"{word}{n}": model(tmp_path) for n in range(8)} for word in ("a", "b")]
    gateway = await start_gateway(models={})
    for turn in range(6):
        applying = asyncio.create_task(gateway.post("/v1/config/apply", {"settings": {"models": sets[turn % 2]}}))
        await asyncio.sleep(0.004 * (turn + 1))
        gateway.process.kill()
        await gateway.process.wait()
        await asyncio.gather(applying, return_exceptions=True)
        await gateway.session.close()
        gateway = await start_gateway(models={}, home=gateway.home)
        served = set(await origins(gateway))
        assert served in (set(), set(sets[0]), set(sets[1]))


# --- signals


async def test_a_gateway_without_a_file_reads_its_environment_again(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    gateway.process.send_signal(signal.SIGHUP)
    assert (await taken_up(gateway))["steps"] == "nothing is other than it was"


async def test_how_long_engines_outlive_the_gateway_holds_for_those_that_run(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    env = {"HOSTLER_ON_EXIT": "keep", "HOSTLER_ORPHAN_TIMEOUT_S": ""}
    gateway = await start_gateway(models={"m": model(tmp_path, preload=True)}, orphan_timeout_s=600, env=env)
    await until(lambda: all_of(gateway, "m"))
    engine = (await pids(gateway))["m"][0]
    save(gateway, settings_of(gateway) | {"orphan_timeout_s": 1})
    await taken_up(gateway)
    await gateway.end(signal.SIGTERM)
    assert is_running(engine)

    async def has_ended() -> bool:
        return not is_running(engine)

    await until(has_ended)


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("is_ignored", [False, True])
async def test_a_terminal_that_closes_ends_the_gateway_unless_it_was_to_outlive_it(
    is_ignored: bool, is_restarted: bool, tmp_path: Path
) -> None:
    program = (
        "import os,signal,sys;"
        + ("signal.signal(signal.SIGHUP,signal.SIG_IGN);" if is_ignored else "")
        + "os.execv(sys.executable,[sys.executable,'-P','-m','gateway.cli','serve','--port','0','--home',sys.argv[1]])"
    )
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program, str(tmp_path / "home")])
    said = b""

    def read_until_it_listens() -> bytes:
        nonlocal said
        while b"Hostler is at" not in said:
            said += os.read(terminal, 1000)
        return said

    await asyncio.wait_for(asyncio.to_thread(read_until_it_listens), LIMIT_S)
    if is_restarted:
        address = re.findall(rb"http://127\.0\.0\.1:\d+", said)[-1].decode()
        async with aiohttp.ClientSession() as session, session.post(f"{address}/v1/restart") as answer:
            assert answer.status == 200
            gateway = (await answer.json())["pid"]
    else:
        gateway = pid
    os.kill(pid, signal.SIGHUP)
    await asyncio.sleep(0.5)
    assert is_running(pid), "while the terminal is there, it is about the settings"
    assert is_running(gateway)
    os.close(terminal)
    if is_ignored:
        os.kill(gateway, signal.SIGHUP)  # as a shell does that ends
        await asyncio.sleep(1)
        assert is_running(pid)
        assert is_running(gateway)
        os.kill(pid, signal.SIGTERM)
    _, status = await asyncio.wait_for(asyncio.to_thread(os.waitpid, pid, 0), LIMIT_S)
    assert os.waitstatus_to_exitcode(status) == 0
