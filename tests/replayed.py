"""A schedule of the yard's model, done again through the door of a real gateway, with processes as engines.

    python tests/replayed.py generate FOLDER [--count 100] [--seed 1] [--steps 50]
    python tests/replayed.py run FILE... [--scale 0.05] [--jobs 2] [--json FILE]

What must hold in the model must hold here, as it is seen from outside: all requests end; one that does not end with its
answer was told so, of a cause that the schedule gives; the engines that run, by what the gateway tells and by the
processes themselves, fit into the memory and the limits; nothing is left in the end. Times are scaled, and long rests
cut short. The GPUs are played, the machine's memory is a limit. What cannot be played is left out: that others take of
the machine's memory, and sleep, which this engine does not know.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml
from harness import FAKE_ENGINE, Gateway, events_in
from schedules import Broken, Schedule, generate, read, write

from engines.base import RAM
from gateway.keeper import started_of

GB = 10**9
SCALE = 0.05  # real seconds for one of the schedule; with more, more is under way when something happens
REST_LIMIT_S = 30.0  # of the schedule's seconds: what rests for longer does nothing any more
PATIENCE_S = 60.0  # real seconds, in which everybody has to have their answer
LOOK_PAUSE_S = 0.05
TOKEN_S = 0.01
LATE_S = 1.0  # so long after a death the gateway may still send to the dead
END_LIMIT_S = 30.0
GROUPS = {"few": {"max_loaded": 1}, "alone": {"max_loaded": 2, "exclusive": True}}
HAS_PROCESS = {"starting", "ready", "stopping"}
REFUSED_PAUSE_S = 0.1
OF_FAULTS = ("Traceback", "fault of the gateway", "never retrieved", "was destroyed")


class Asked(msgspec.Struct, kw_only=True):
    """A request, and what became of it."""

    uid: str
    begun: float
    ended: float = 0.0
    id: str
    is_begun: bool = False  # an engine has it
    outcome: str = ""
    text: str = ""


class Span(msgspec.Struct, kw_only=True):
    """Something that was done to a model, from when to when."""

    uid: str
    begun: float
    ended: float = float("inf")
    is_forced: bool = False


class Outcome(msgspec.Struct, kw_only=True):
    """What came of one schedule."""

    schedule: str = ""
    steps: int = 0
    took_s: float = 0.0
    requests: dict[str, int] = {}
    killed: int = 0
    starts: int = 0
    evictions: int = 0
    looks: int = 0
    faults: list[str] = []


class Replay:
    """One schedule at work."""

    def __init__(self, schedule: Schedule, folder: Path, scale: float) -> None:
        self.schedule = schedule
        self.folder = folder
        self.scale = scale
        self.faults: list[str] = []
        self.asked: list[Asked] = []
        self.stops: list[Span] = []
        self.kills: list[Span] = []
        self.failing: set[str] = set()
        self.foreign: dict[str, int] = {}
        self.had_others = False  # on the GPUs
        self.looks = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._crowds: dict[str, list[asyncio.Task[None]]] = {}
        self._flapping: dict[str, asyncio.Task[None]] = {}
        self._engines: dict[int, str] = {}  # pid -> uid, of all that were started

    async def run(self) -> Outcome:
        """All of it, and what came of it."""
        begun = time.monotonic()
        opening = self.schedule[0].arguments
        sizes = zip((RAM, "GPU-0", "GPU-1"), opening["totals"], strict=True)
        self.totals = {key: size * GB for key, size in sizes if size}
        self.max_loaded = opening["max_loaded"]
        self.wishes = dict(zip("abcde", opening["wishes"], strict=True))
        self._prepare()
        self.settings: dict[str, Any] = {
            "engines": {"llama.cpp": {"binary": str(FAKE_ENGINE)}},
            "drain_timeout_s": END_LIMIT_S,
            "restart_limit": 3,
            "max_loaded": self.max_loaded,
            "min_residency_s": opening["min_residency_s"] * self.scale,
            "max_wait_s": opening["max_wait_s"] * self.scale,
            "groups": GROUPS,
            "gpu_headroom": 0,
            "ram_headroom": 0,
            "ram_limit": self.totals[RAM],
            "sleep_memory": opening["sleep_memory"],
            "keepalive_interval_s": 0.5,
            "watch_settings": False,
        }
        own = str(Path(__file__).parent / "played_driver")
        path = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
        environment = {"PLAYED_GPUS": str(self.folder), "PYTHONPATH": path}
        self.gateway = await Gateway.start(self.folder / "home", self.settings, environment)
        self.http = aiohttp.ClientSession(
            self.gateway.address,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE_S * 3),
        )
        try:
            await self._deploy()
            watching = asyncio.create_task(self._watch())
            for step in self.schedule[1:]:
                await getattr(self, step.rule)(**step.arguments)
            await self._until_all_have_ended()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            evictions = await self._evictions()
        finally:
            others = [*self._flapping.values(), *itertools.chain(*self._crowds.values())]
            for task in (*self._tasks, *others):
                task.cancel()
            await asyncio.gather(*self._tasks, *others, return_exceptions=True)
            await self.http.close()
            await self._end()
        self._judge()
        return Outcome(
            steps=len(self.schedule),
            took_s=time.monotonic() - begun,
            requests=dict(Counter(one.outcome for one in self.asked)),
            killed=len(self.kills),
            starts=len(self._engines),
            evictions=evictions,
            looks=self.looks,
            faults=self.faults,
        )

    # --- the machine and the models

    def _prepare(self) -> None:
        (self.folder / "processes").mkdir()
        self._say("gpus", {key: size for key, size in self.totals.items() if key != RAM})
        self._say("foreign", {})
        self._say("foreigner", os.getpid())
        self._say("hangs_until", 0)
        for uid, wish in self.wishes.items():
            (self.folder / f"{uid}.gguf").write_bytes(b"GGUF")
            self._say(f"{uid}.fails", wish["fails"])
            if wish["fails"]:
                self.failing.add(uid)

    def _say(self, name: str, what: Any) -> None:
        """To the played driver, or to the engines; whole or not at all."""
        new = self.folder / f"{name}.new"
        new.write_text(json.dumps(what))
        new.replace(self.folder / name)

    async def _deploy(self) -> None:
        models = {uid: self._model(uid, wish) for uid, wish in self.wishes.items()}
        await self._call("POST", "/v1/config/apply", {"settings": {"models": models}}, well=(200,))

    def _model(self, uid: str, wish: dict[str, Any]) -> dict[str, Any]:
        fields = {name: value for name, value in wish["fields"].items() if value is not None}
        fields |= {name: fields[name] * self.scale for name in ("idle_timeout_s", "sleep_after_s") if name in fields}
        behaviour = {
            "ready_after_s": wish["load_s"] * self.scale,
            "stop_delay_s": wish["stop_s"] * self.scale,
            "tokens": 1_000_000,
            "token_delay_s": TOKEN_S,
            "fail_file": str(self.folder / f"{uid}.fails"),
            "held_folder": str(self.folder / "processes"),
            "held_bytes": wish["memory"],
            "events_file": str(self.folder / "events"),
        }
        return {
            "model_path": str(self.folder / f"{uid}.gguf"),
            "model_engine": "llama.cpp",
            "memory": wish["memory"],
            "options": {"split_mode": "none"},  # as the model's engine, which nothing spreads
            "replica": wish["replica"],
            "load_timeout_s": PATIENCE_S * 2,
            "envs": {"FAKE_ENGINE": json.dumps(behaviour)},
            **fields,
        }

    # --- the rules of the model, by their names

    async def requests(self, uid: str, service_s: float, count: int, pause_s: float) -> None:
        for _ in range(count):
            self._background(self._request(uid, service_s))
        await self._rest(pause_s)

    async def a_client_that_leaves(self, uid: str, service_s: float, leaves_after_s: float) -> None:
        self._background(self._request(uid, service_s, leaves_after_s))

    async def time_passes(self, duration_s: float) -> None:
        await self._rest(duration_s)

    async def an_engine_crashes(self, uid: str, at: int, later_s: float) -> None:
        await self._rest(later_s)
        replicas = [one for one in await self._replicas() if one["uid"] == uid]
        if replicas and (replica := replicas[at % len(replicas)])["state"] in ("ready", "starting") and replica["pid"]:
            self.kills.append(Span(uid=uid, begun=time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.kill(replica["pid"], signal.SIGKILL)

    async def starts_will_fail(self, uid: str, count: int) -> None:
        self.failing.add(uid)
        self._say(f"{uid}.fails", count)

    async def somebody_starts_it(self, uid: str) -> None:
        await self._call("POST", f"/v1/models/{uid}/start", well=(202,))

    async def somebody_stops_it(self, uid: str, force: bool) -> None:
        async def stop() -> None:
            span = Span(uid=uid, begun=time.monotonic(), is_forced=force)
            self.stops.append(span)
            await self._call("POST", f"/v1/models/{uid}/stop?force={str(force).lower()}", well=(200,))
            span.ended = time.monotonic()

        self._background(stop())
        await asyncio.sleep(0)

    async def a_replica_more(self, uid: str) -> None:
        if len([one for one in await self._replicas() if one["uid"] == uid]) < 4:
            await self._call("POST", f"/v1/models/{uid}/replicas?wait_ready=false", {"replica": 1}, well=(200,))

    async def a_replica_less(self, uid: str) -> None:
        async def remove() -> None:
            # Of two that are removed at once the second may be there no longer, or be the last, which stays.
            replicas = [one["replica"] for one in await self._replicas() if one["uid"] == uid]
            wished = (await self._call("GET", f"/v1/models/{uid}", well=(200,)))["replica"]
            if len(replicas) > 1 and wished > 1:
                await self._call("DELETE", f"/v1/models/{uid}/replicas/{replicas[-1]}", well=(200, 400))

        self._background(remove())
        await asyncio.sleep(LOOK_PAUSE_S)

    async def others_take_memory(self, key: str, gigabytes: int) -> None:
        if key in self.totals and key != RAM:
            self.foreign[key] = gigabytes * GB
            self.had_others = True
            self._say("foreign", self.foreign)

    async def others_come_and_go(self, key: str, gigabytes: int, has_s: float, has_not_s: float) -> None:
        if (before := self._flapping.pop(key, None)) is not None:
            before.cancel()

        async def flap() -> None:
            while True:
                await self.others_take_memory(key, gigabytes)
                await asyncio.sleep(has_s * self.scale)
                await self.others_take_memory(key, 0)
                await asyncio.sleep(has_not_s * self.scale)

        self._flapping[key] = asyncio.create_task(flap())

    async def the_gpus_driver_hangs(self, duration_s: float) -> None:
        self._say("hangs_until", time.monotonic() + duration_s * self.scale)

    async def a_crowd_comes_that_asks_on_and_on(self, uid: str, count: int, service_s: float) -> None:
        async def ask_on() -> None:
            while True:
                if await self._request(uid, service_s) != "answered":
                    await asyncio.sleep(REFUSED_PAUSE_S)

        crowd = self._crowds.setdefault(uid, [])
        if len(crowd) < 6:
            crowd += [asyncio.create_task(ask_on()) for _ in range(count)]

    async def the_crowd_goes(self, uid: str) -> None:
        clients = self._crowds.pop(uid, [])
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    async def somebody_waits_until_it_is_ready(self, uid: str, leaves_after_s: float) -> None:
        async def wait() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(leaves_after_s * self.scale):
                    await self._call("POST", f"/v1/models/{uid}/wake", well=(200, 503))

        self._background(wait())

    async def sleeps_and_wakes_will_fail(self, uid: str, count: int) -> None:
        pass  # it cannot sleep

    async def somebody_puts_it_to_sleep(self, uid: str) -> None:
        await self._call("POST", f"/v1/models/{uid}/sleep", well=(400, 409))

    async def the_settings_change(self, max_wait_s: float, min_residency_s: float) -> None:
        self.settings |= {"max_wait_s": max_wait_s * self.scale, "min_residency_s": min_residency_s * self.scale}
        (self.folder / "home" / "settings.yaml").write_text(yaml.safe_dump(self.settings))
        self.gateway.process.send_signal(signal.SIGHUP)

    # --- how they are done

    async def _rest(self, duration_s: float) -> None:
        await asyncio.sleep(min(duration_s, REST_LIMIT_S) * self.scale)

    def _background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()):
            self.faults.append(f"a client failed: {fault!r}")

    async def _call(self, method: str, path: str, body: Any = None, *, well: Sequence[int]) -> Any:
        async with self.http.request(method, path, json=body) as reply:
            text = await reply.text()
            if reply.status not in well:
                self.faults.append(f"{method} {path} was answered {reply.status}: {text[:300]}")
            return json.loads(text) if reply.status == 200 else None

    async def _replicas(self) -> list[dict[str, Any]]:
        return list(await self._call("GET", "/v1/replicas", well=(200,)))

    async def _request(self, uid: str, service_s: float, leaves_after_s: float | None = None) -> str:
        """Ask; what became of it."""
        asked = Asked(uid=uid, begun=time.monotonic(), id=f"asked-{len(self.asked)}")
        self.asked.append(asked)
        is_stream = len(self.asked) % 2 == 0
        body = {
            "model": uid,
            "prompt": "x",
            "max_tokens": max(1, round(service_s * self.scale / TOKEN_S)),
            "stream": is_stream,
        }
        try:
            async with asyncio.timeout(None if leaves_after_s is None else leaves_after_s * self.scale):
                async with self.http.post("/v1/completions", json=body, headers={"x-request-id": asked.id}) as reply:
                    await (_read_stream if is_stream and reply.status == 200 else _read_whole)(reply, asked)
        except TimeoutError:
            asked.outcome = "waits for ever" if leaves_after_s is None else "left"
        except aiohttp.ClientError as exc:
            asked.outcome, asked.text = "broken off", repr(exc)
        except asyncio.CancelledError:
            asked.outcome, asked.ended = "left", time.monotonic()
            raise
        asked.ended = time.monotonic()
        return asked.outcome

    async def _until_all_have_ended(self) -> None:
        for flapping in self._flapping.values():
            flapping.cancel()
        for uid in list(self._crowds):
            await self.the_crowd_goes(uid)
        self._say("foreign", {})
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=PATIENCE_S)
        if waiting := [one for one in self.asked if not one.outcome]:
            states = {(one["uid"], one["state"], one["in_flight"]) for one in await self._replicas()}
            self.faults.append(f"{[one.uid for one in waiting]} wait for ever: {sorted(states)}")
        elif self._tasks:
            self.faults.append(f"{len(self._tasks)} changes do not end")

    async def _evictions(self) -> int:
        async with self.http.get("/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return round(
            sum(float(line.split()[-1]) for line in lines if line.startswith("hostler_model_evictions_total{"))
        )

    async def _end(self) -> None:
        try:
            code = await self.gateway.end(signal.SIGTERM, limit_s=END_LIMIT_S)
            if code != 0:
                self.faults.append(f"the gateway ended with {code}")
        except TimeoutError:
            self.faults.append("the gateway does not end")
            self.gateway.process.kill()
        self._read_events()
        if left := [pid for pid in self._engines if started_of(pid)]:
            self.faults.append(f"engines were left behind: {left}")
        said = self.gateway.log.read_text()
        self.faults += [f"the gateway's log has {word!r}" for word in OF_FAULTS if word in said]

    # --- what must hold

    async def _watch(self) -> None:
        while True:
            self._look_at({(one["uid"], one["pid"]) for one in await self._replicas() if _has_process(one)}, "told")
            self._read_events()
            # Who is there before and after was there in between, all at once.
            first = [pid for pid in self._engines if started_of(pid)]
            self._look_at({(self._engines[pid], pid) for pid in first if started_of(pid)}, "seen")
            self.looks += 1
            await asyncio.sleep(LOOK_PAUSE_S)

    def _look_at(self, running: set[tuple[str, int]], how: str) -> None:
        """Whether those that run at one moment may: each a uid and a pid."""
        held = Counter[str]()
        for uid, pid in running:
            with contextlib.suppress(FileNotFoundError):  # it has only just begun
                on_gpus = json.loads((self.folder / "processes" / str(pid)).read_text())
                held.update(on_gpus or {RAM: self.wishes[uid]["memory"]})
        for key, size in held.items():
            self._must(size <= self.totals[key], f"{how}: {sorted(running)} hold {size} of {self.totals[key]} of {key}")
        loaded = {uid for uid, _ in running}
        most = self.max_loaded or len(self.wishes)
        self._must(len(loaded) <= most, f"{how}: {sorted(loaded)} are loaded, {most} may be")
        for name, group in GROUPS.items():
            members = {uid for uid in loaded if self.wishes[uid]["fields"]["group"] == name}
            self._must(len(members) <= group["max_loaded"], f"{how}: {sorted(members)} of group {name} are loaded")
            is_shared = group.get("exclusive") and members and loaded - members
            self._must(not is_shared, f"{how}: {sorted(loaded)} are loaded beside the group {name}")

    def _must(self, holds: bool, otherwise: str) -> None:
        if not holds and otherwise not in self.faults:
            self.faults.append(otherwise)

    def _read_events(self) -> None:
        for event in events_in(self.folder / "events", "start"):
            words = event["argv"]
            self._engines.setdefault(event["pid"], words[words.index("--alias") + 1])

    def _judge(self) -> None:
        begun = {event["id"] for event in events_in(self.folder / "events", "request")}
        for one in self.asked:
            one.is_begun = one.id in begun
            if not self._is_explained(one):
                self.faults.append(f"{one.uid}: {one.outcome} after {one.ended - one.begun:.2f} s: {one.text[:400]}")

    def _is_explained(self, one: Asked) -> bool:
        """Whether a request may have ended so, by what was done to its model meanwhile."""
        stops = [
            stop for stop in self.stops if stop.uid == one.uid and stop.begun <= one.ended and stop.ended >= one.begun
        ]
        kills = [kill for kill in self.kills if kill.uid == one.uid and one.begun - LATE_S <= kill.begun <= one.ended]
        is_cut = bool(kills) or any(stop.is_forced for stop in stops)
        match one.outcome:
            case "answered" | "left":
                return True
            case "" if not one.ended:
                return True  # it is told of already
            case "model_stopped":
                return bool(stops) and (is_cut or not one.is_begun)
            case "rate_limit_exceeded":
                fields = self.wishes[one.uid]["fields"]
                return fields["request_limits"] is not None or fields["queue_limit"] is not None
            case "engine_died" | "broken off":
                return is_cut
            case "model_failed" | "model_cooling_down":
                return not one.is_begun and self._may_fail(one)
        return False

    def _may_fail(self, one: Asked) -> bool:
        if one.uid in self.failing or any(kill.uid == one.uid and kill.begun <= one.ended for kill in self.kills):
            return True
        if "cannot be placed" not in one.text:
            return False
        pinned = [uid for uid, wish in self.wishes.items() if wish["fields"]["pinned"]]
        return self.had_others or any(f"{uid} is pinned" in one.text for uid in pinned) or not self._fits(one.uid)

    def _fits(self, uid: str) -> bool:
        """Whether the machine, if it were empty, has room for a copy."""
        wish = self.wishes[uid]
        n_gpu, size = wish["fields"]["n_gpu"], wish["memory"]
        gpus = sorted((total for key, total in self.totals.items() if key != RAM), reverse=True)
        count = (1 if gpus else 0) if n_gpu is None else n_gpu
        in_ram = size <= self.totals[RAM]
        if count == 0:
            return in_ram
        return (len(gpus) >= count and size // count <= gpus[count - 1]) or (wish["fields"]["cpu_fallback"] and in_ram)


def _has_process(replica: dict[str, Any]) -> bool:
    return replica["state"] in HAS_PROCESS and replica["pid"] is not None


async def _read_whole(reply: aiohttp.ClientResponse, asked: Asked) -> None:
    asked.text = await reply.text()
    answer = json.loads(asked.text)
    asked.outcome = "answered" if reply.status == 200 else str(answer["error"]["code"])


async def _read_stream(reply: aiohttp.ClientResponse, asked: Asked) -> None:
    is_done, error = False, None
    async for line in reply.content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            is_done = True
            break
        event = json.loads(line[6:])
        error = event.get("error") or error
    if error:
        asked.outcome, asked.text = str(error["code"]), error["message"]
    else:
        asked.outcome = "answered" if is_done else "broken off"


async def replay(schedule: Schedule, folder: Path, scale: float = SCALE) -> Outcome:
    """Do it again.

    Args:
        folder: an empty one, with a short path.
    """
    return await Replay(schedule, folder, scale).run()


# --- by hand


async def _run_all(options: argparse.Namespace) -> int:
    files: asyncio.Queue[Path] = asyncio.Queue()
    for file in options.files:
        files.put_nowait(file)
    outcomes: list[Outcome] = []

    async def work() -> None:
        while not files.empty():
            file = files.get_nowait()
            with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as name:
                outcome = await replay(read(file), Path(name), options.scale)
                if outcome.faults:
                    kept = file.with_suffix(".log")
                    kept.write_text((Path(name) / "home" / "gateway.log").read_text())
            outcome.schedule = file.name
            outcomes.append(outcome)
            print(f"{file.name}: {outcome.took_s:.1f} s, {outcome.requests}", *outcome.faults, sep="\n  ", flush=True)

    await asyncio.gather(*(work() for _ in range(options.jobs)))
    requests = Counter[str]()
    for one in outcomes:
        requests.update(one.requests)
    print(f"\n| of {len(outcomes)} schedules, times x {options.scale:g} | |\n| --- | --- |")
    for name in ("steps", "starts", "killed", "evictions", "looks"):
        print(f"| {name} | {sum(getattr(one, name) for one in outcomes)} |")
    for name, count in requests.most_common():
        print(f"| requests: {name} | {count} |")
    print(f"| schedules in which something did not hold | {sum(bool(one.faults) for one in outcomes)} |")
    if options.json:
        Path(options.json).write_bytes(msgspec.json.format(msgspec.json.encode(outcomes)))
    return any(one.faults for one in outcomes)


def _generate(options: argparse.Namespace) -> int:
    logging.disable()  # the model's failures are meant
    spec = importlib.util.spec_from_file_location("yard", Path(__file__).parent / "gateway" / "test_yard_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options.folder.mkdir(parents=True, exist_ok=True)
    is_all_well = True
    for seed in range(options.seed, options.seed + options.count):
        try:
            schedule = generate(module.Yard, seed, options.steps)
        except Broken as broken:
            is_all_well = False
            print(f"In {seed:04}-broken.jsonl it does not hold in the model: {broken}", flush=True)
            write(broken.schedule, options.folder / f"{seed:04}-broken.jsonl")
        else:
            write(schedule, options.folder / f"{seed:04}.jsonl")
    return 0 if is_all_well else 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    making = verbs.add_parser("generate")
    making.add_argument("folder", type=Path)
    making.add_argument("--count", type=int, default=100)
    making.add_argument("--seed", type=int, default=1)
    making.add_argument("--steps", type=int, default=50)
    making.set_defaults(do=_generate)
    running = verbs.add_parser("run")
    running.add_argument("files", type=Path, nargs="+")
    running.add_argument("--scale", type=float, default=SCALE)
    running.add_argument("--jobs", type=int, default=1)
    running.add_argument("--json")
    running.set_defaults(do=lambda options: asyncio.run(_run_all(options)))
    options = parser.parse_args()
    return int(options.do(options))


if __name__ == "__main__":
    sys.exit(main())
