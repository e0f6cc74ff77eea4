"""The verbs for models of one's own: what they send, what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from click.testing import CliRunner
from harness import StartGateway
from stand_in import LAUNCHED, LOADING, READY, Raw, Refusal, StandIn, Turns

from gateway.cli import hostler
from gateway.cli.alias import translate
from gateway.cli.launch import typed

LIMIT_S = 60


class Done(NamedTuple):
    code: int | None
    out: str
    err: str


class Shell:
    """Runs verbs as their users do, against one address."""

    def __init__(self, home: Path, address: str) -> None:
        self.home, self.address = home, address

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOSTLER_", "XINFERENCE_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        return kept | {"HOME": str(self.home), "PATH": path, "HOSTLER_ENDPOINT": self.address}

    async def start(self, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        given = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "env": self.environment(), "cwd": self.home} | options
        return await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", "gateway.cli", *arguments, **given)

    async def __call__(self, *arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> Done:
        process = await self.start(*arguments, env=self.environment() | (env or {}))
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate(stdin.encode())
        assert b"Traceback" not in err, err.decode()
        return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    async with StandIn() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path, stand_in: StandIn) -> Shell:
    return Shell(tmp_path, stand_in.address)


def run_here(*arguments: str) -> Any:
    return CliRunner().invoke(hostler, arguments, prog_name="hostler")


# --- launch


async def test_a_launch_sends_what_was_given_and_nothing_else(run: Shell, stand_in: StandIn) -> None:
    done = await run("launch", "-n", "qwen3", "-en", "vLLM", "-s", "0_5", "-f", "pytorch", "-q", "none")
    assert done == (0, "", "m: completed\nModel uid: m\n")
    (asked,) = stand_in.requests("POST", "/v1/models")
    assert asked["query"] == {"wait_ready": "false"}
    assert asked["body"] == {
        "model_name": "qwen3",
        "model_type": "LLM",
        "model_engine": "vLLM",
        "model_size_in_billions": "0_5",
        "model_format": "pytorch",
        "quantization": "none",
    }


async def test_every_option_of_a_launch(run: Shell, stand_in: StandIn) -> None:
    options = """-t image -u u -r 2 --n-worker 1 --n-gpu none --gpu-idx 0,1 --worker-ip 10.0.0.1 --context-length 4096
        -lm a /a -lm b /b -ld scale 0.5 -fd x true -qc load_in_8bit true --trust-remote-code true --model_path /m
        --enable-thinking --disable-virtual-env -vp numpy<2 -vp torch --virtual-env-find-link /w -ev A 1 -ev B x
        --replica-config [{"replica_uid":"r"}]"""
    done = await run("launch", "--model-name", "m", *options.split())
    assert done.code == 0, done.err
    assert stand_in.body("POST", "/v1/models") == {
        "model_name": "m",
        "model_type": "image",
        "model_uid": "u",
        "replica": 2,
        "n_worker": 1,
        "n_gpu": None,
        "gpu_idx": [0, 1],
        "worker_ip": "10.0.0.1",
        "context_length": 4096,
        "peft_model_config": {
            "lora_list": [{"lora_name": "a", "local_path": "/a"}, {"lora_name": "b", "local_path": "/b"}],
            "image_lora_load_kwargs": {"scale": 0.5},
            "image_lora_fuse_kwargs": {"x": True},
        },
        "quantization_config": {"load_in_8bit": True},
        "trust_remote_code": True,
        "model_path": "/m",
        "enable_thinking": True,
        "enable_virtual_env": False,
        "virtual_env_packages": ["numpy<2", "torch"],
        "virtual_env_find_links": ["/w"],
        "envs": {"A": "1", "B": "x"},
        "replica_config": [{"replica_uid": "r"}],
    }


async def test_further_pairs_are_typed_and_take_dash_and_underscore(run: Shell, stand_in: StandIn) -> None:
    pairs = "--max-model-len 4096 --gpu_memory_utilization=0.5 --n_gpu_layers -1 --rope -1e3 --a.b x --enforce-eager"
    done = await run(
        "launch", *pairs.split(), "--model_name", "m", "--cfg", '{"a": [1]}', "--no", "None", "--yes", "true"
    )
    assert done.code == 0, done.err
    assert stand_in.body("POST", "/v1/models") == {
        "model_name": "m",
        "model_type": "LLM",
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.5,
        "n_gpu_layers": -1,
        "rope": -1000.0,
        "a.b": "x",
        "enforce_eager": True,
        "cfg": {"a": [1]},
        "yes": True,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None),
        ("True", True),
        ("false", False),
        ("1", 1),
        ("-1", -1),
        ("1.5", 1.5),
        ("[1, 2]", [1, 2]),
        ("{bad", "{bad"),
        ("x", "x"),
        ("", ""),
    ],
)
def test_values_are_typed(text: str, value: object) -> None:
    assert typed(text) == value
    assert type(typed(text)) is type(value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-n", "m", "--model-path", "/a", "--model_path", "/b"], "Cannot set both for --model-path and --model_path"),
        (
            ["-n", "m", "extra"],
            "You must specify extra kwargs with `--` prefix. There is an error in parameter passing that is extra.",
        ),
        ([], "--model-name"),
        (["-n", "m", "--gpu-idx", "a"], "no list of GPUs"),
        (["-n", "m", "--n-gpu", "many"], "neither a number"),
        (["-n", "m", "--replica-config", "{"], "no JSON"),
        (["-n", "m", "-z"], "-z"),
    ],
)
def test_a_launch_that_is_wrong_is_told(arguments: list[str], words: str) -> None:
    result = run_here("launch", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


async def test_a_launch_shows_how_far_it_is_and_why_it_failed(run: Shell, stand_in: StandIn) -> None:
    failed = [{**LAUNCHED, "status": "ERROR", "replica_statuses": [{"error_message": "There is no room."}]}]
    stand_in.answers["GET", "/v1/models/instances"] = Turns([LOADING, LOADING, failed])
    stand_in.answers["GET", "/v1/models/m/progress"] = Turns(
        [
            {"progress": 0.5, "stage": "downloading"},
            {"progress": 0.9, "stage": "loading", "replicas": [{"error_message": "It exited with 1."}]},
        ]
    )
    done = await run("launch", "-n", "m")
    assert done.code == 1
    assert done.err.splitlines() == [
        "m: downloading",
        "It exited with 1.",
        "m: loading",
        "hostler: m was not launched: There is no room.",
    ]


async def test_a_launch_for_programs(run: Shell) -> None:
    done = await run("launch", "-n", "m", "--json")
    assert json.loads(done.out) == {"model_uid": "m"}


async def test_a_terminal_gets_a_bar(run: Shell, stand_in: StandIn) -> None:
    stand_in.answers["GET", "/v1/models/instances"] = Turns([LOADING, READY])
    stand_in.answers["GET", "/v1/models/m/progress"] = {"progress": 0.5, "stage": "downloading"}
    stand_in.answers["GET", "/v1/replicas"] = [{"uid": "m", "progress": "12 of 30 MB"}]
    ours, theirs = pty.openpty()
    process = await run.start(
        "launch", "-n", "m", stderr=theirs, env=run.environment() | {"TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(theirs)
    async with asyncio.timeout(LIMIT_S):
        await process.communicate()
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == 0
    assert [word for word in ("downloading", "50%", "12 of 30 MB", "Model uid: m") if word not in shown] == []


@pytest.mark.parametrize(("answer", "is_cancelled"), [("y\n", True), ("n\n", False), ("", False)])
async def test_ctrl_c_asks_whether_to_cancel(answer: str, is_cancelled: bool, run: Shell, stand_in: StandIn) -> None:
    stand_in.answers["GET", "/v1/models/instances"] = LOADING
    stand_in.answers["GET", "/v1/models/m/progress"] = {"progress": 0.5, "stage": "loading"}
    process = await run.start("launch", "-n", "m")
    assert process.stderr
    async with asyncio.timeout(LIMIT_S):
        assert await process.stderr.readline() == b"m: loading\n"
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate(answer.encode())
    assert process.returncode == 130
    assert b"Cancel the launch of m?" in err
    assert (b"is cancelled" in err, b"goes on loading" in err) == (is_cancelled, not is_cancelled)
    assert len(stand_in.requests("POST", "/v1/models/m/cancel")) == is_cancelled


# --- registrations


async def test_a_file_is_registered_as_it_is(run: Shell, stand_in: StandIn) -> None:
    text = '{"model_name":  "mine"}'
    (run.home / "model.json").write_text(text)
    done = await run("register", "--model-type", "LLM", "--file", "model.json", "--persist")
    assert done == (0, "It is registered.\n", "")
    body = stand_in.body("POST", "/v1/model_registrations/LLM")
    assert body == {"model": text, "persist": True, "worker_ip": None}


async def test_what_was_read_otherwise_than_written_is_told(run: Shell, stand_in: StandIn) -> None:
    stand_in.answers["POST", "/v1/model_registrations/LLM"] = Raw(
        b"null", content_type="application/json", x_hostler_notes="Version 1 was lifted to 2%3A caf%C3%A9."
    )
    (run.home / "model.json").write_text("{}")
    done = await run("register", "-f", "model.json")
    assert done.out.splitlines() == [
        "It is registered until the gateway ends; --persist keeps it.",
        "Version 1 was lifted to 2: café.",
    ]


async def test_a_file_that_is_refused_is_told(run: Shell, stand_in: StandIn) -> None:
    stand_in.answers["POST", "/v1/model_registrations/LLM"] = Refusal(400, "Required key 'model_specs' is missing")
    (run.home / "model.json").write_text("{}")
    assert await run("register", "model.json") == (1, "", "hostler: Required key 'model_specs' is missing\n")
    assert "nothing.json cannot be read" in (await run("register", "nothing.json")).err
    assert (await run("register")).code == 2


async def test_registrations_are_listed(run: Shell) -> None:
    table = (await run("registrations", "--model-type", "LLM")).out.splitlines()
    assert table[0].split() == ["TYPE", "NAME", "LANGUAGE", "ABILITY", "BUILT-IN"]
    assert [line.split() for line in table[1:]] == [
        ["LLM", "mine", "en", "zh", "generate", "no"],
        ["LLM", "qwen3", "en", "chat", "yes"],
    ]
    custom = await run("registrations", "--custom", "--json")
    assert [one["model_name"] for one in json.loads(custom.out)] == ["mine"]


@pytest.mark.parametrize("words", [["mine"], ["--model-name", "mine"], ["-n", "mine", "-t", "LLM"]])
async def test_a_registration_is_forgotten(words: list[str], run: Shell, stand_in: StandIn) -> None:
    assert await run("unregister", *words) == (0, "mine is not registered any more.\n", "")
    assert len(stand_in.requests("DELETE", "/v1/model_registrations/LLM/mine")) == 1


async def test_registrations_of_another_server_are_taken_over(run: Shell, stand_in: StandIn) -> None:
    below = run.home / ".xinference" / "model" / "v2"
    for path, name in (("llm", "mine"), ("embedding", "refused"), ("builtin/llm", "shipped")):
        (below / path).mkdir(parents=True)
        (below / path / f"{name}.json").write_text(json.dumps({"model_name": name}))
    stand_in.answers["POST", "/v1/model_registrations/embedding"] = Refusal(400, "Its name is taken.")
    done = await run("import", "xinference")
    assert done.code == 1
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[1:] == [
        ["embedding", "refused.json", "no", "Its", "name", "is", "taken."],
        ["LLM", "mine.json", "yes"],
        ["1", "taken", "over,", "1", "not."],
    ]
    assert stand_in.body("POST", "/v1/model_registrations/LLM")["persist"] is True
    given = await run("import", "xinference", str(below), "--json")
    assert [one["is_registered"] for one in json.loads(given.out)] == [False, True]
    nothing = await run("import", "xinference", str(run.home))
    assert (nothing.code, "There is no registration" in nothing.err) == (1, True)


def test_the_schema_of_registrations_is_one_that_editors_can_follow() -> None:
    result = run_here("schema", "llm")
    assert result.exit_code == 0
    assert "model_name" in result.output
    assert "Did you mean 'LLM'" in run_here("schema", "LLMs").output


# --- models


async def test_models_of_every_type_are_listed(run: Shell) -> None:
    table = (await run("list")).out.splitlines()
    assert table[1].split() == ["e", "-", "embedding", "bge-m3", "-", "-", "-", "embed", "8192"]


async def test_a_model_is_terminated(run: Shell, stand_in: StandIn) -> None:
    assert await run("terminate", "--model-uid", "m") == (0, "m is terminated.\n", "")
    assert await run("terminate", "m") == (0, "m is terminated.\n", "")
    assert (await run("terminate")).code == 2
    assert (await run("terminate", "a", "--model-uid", "b")).code == 2


async def test_a_models_life_from_the_command_line(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={"tokens": 3})
    run = Shell(tmp_path, gateway.address)
    assert (await run("generate", "--model-uid", "fake", "--max_tokens", "3", stdin="one\n\nnever\n")).out.count(
        "\n"
    ) == 1
    for stream in ("true", "false"):
        done = await run("chat", "--model-uid", "fake", "--stream", stream, stdin="hello\n")
        assert (done.code, bool(done.out.strip())) == (0, True)
    failed = await run("generate", "nothing", stdin="one\n")
    assert (failed.code, "nothing" in failed.err) == (1, True)


async def test_embedding_and_rerank(run: Shell, stand_in: StandIn) -> None:
    done = await run("embedding", "e", "a text")
    assert done.out.splitlines()[1].split() == ["a", "text", "5", *["0.1000", "0.2000", "0.3000", "0.4000", "..."]]
    assert stand_in.body("POST", "/v1/embeddings") == {"model": "e", "input": ["a text"]}
    done = await run("rerank", "--model-uid", "r", "query", "first", "second", "--top-n", "2")
    assert [line.split() for line in done.out.splitlines()[1:]] == [["0.9000", "1", "second"], ["0.1000", "0", "first"]]
    assert stand_in.body("POST", "/v1/rerank")["top_n"] == 2
    assert json.loads((await run("rerank", "r", "q", "d", "--json")).out)["results"]
    assert (await run("rerank", "r", "q")).code == 2


# --- engines


async def test_engines_are_shown_with_reasons(run: Shell) -> None:
    done = await run("engine", "-n", "qwen3", "-q", "q8_0")
    assert [line.split() for line in done.out.splitlines()[1:]] == [
        ["qwen3", "llama.cpp", "ggufv2", "0_6", "Q4_K_M", "Q8_0"],
        ["vLLM", "cannot", "run", "it:", "vLLM", "is", "not", "installed"],
    ]
    done = await run("engine", "-n", "qwen3", "-s", "0.6", "-en", "LLAMA.CPP", "--json")
    assert [one["model_size_in_billions"] for one in json.loads(done.out)["llama.cpp"]] == ["0_6"]
    assert (await run("engine", "-n", "qwen3", "-f", "awq")).code == 1
    unknown = await run("engine", "-n", "nothing")
    assert (unknown.code, "There is no LLM model 'nothing'" in unknown.err) == (1, True)


async def test_the_models_of_vllm_are_listed(run: Shell) -> None:
    done = await run("vllm-models")
    assert [line.split() for line in done.out.splitlines()[1:]] == [["chat", "qwen3"], ["generate", "opt"]]


# --- cache


@pytest.mark.parametrize("verb", [["cached", "--model_name", "qwen3"], ["cache", "list"]])
async def test_downloaded_models_are_listed(verb: list[str], run: Shell) -> None:
    done = await run(*verb)
    assert "qwen3--8b--ggufv2--Q4_K_M" in done.out
    assert "5,000 MB" in done.out


@pytest.mark.parametrize("verb", [["remove-cache", "--model_version", "v"], ["cache", "remove", "v"]])
@pytest.mark.parametrize(("answer", "words", "n_removed"), [("y\n", "v is deleted.", 1), ("n\n", "Nothing was", 0)])
async def test_files_are_deleted_after_a_yes(
    verb: list[str], answer: str, words: str, n_removed: int, run: Shell, stand_in: StandIn
) -> None:
    done = await run(*verb, stdin=answer)
    assert done.code == 0
    assert done.out.startswith("/cache/qwen3/a.gguf\n")
    assert words in done.out
    assert len(stand_in.requests("DELETE", "/v1/cache/models")) == n_removed


async def test_files_are_deleted_without_a_question_if_told_so(run: Shell, stand_in: StandIn) -> None:
    assert (await run("remove-cache", "-n", "v", "--check")).code == 0
    stand_in.answers["GET", "/v1/cache/models/files"] = {"paths": []}
    assert "There is no file of v" in (await run("remove-cache", "-n", "v", "--check")).err


async def test_pruning_keeps_what_is_in_use(run: Shell, stand_in: StandIn) -> None:
    done = await run("cache", "prune", stdin="y\n")
    assert (done.code, "5,000 MB are free" in done.out) == (0, True)
    stand_in.answers["GET", "/v1/models"] = {"data": [{"id": "q", "model_name": "qwen3"}]}
    assert (await run("cache", "prune")).out == "Every downloaded model is in use.\n"
    assert len(stand_in.requests("DELETE", "/v1/cache/models")) == 1


# --- keys


async def test_a_token_is_kept_and_sent(run: Shell, stand_in: StandIn) -> None:
    done = await run("login", "--username", "u", "--password", "p")
    assert done.code == 0, done.err
    file = run.home / ".hostler" / "auth" / sha256(stand_in.address.encode()).hexdigest()
    assert file.read_text() == "a-token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stand_in.body("POST", "/token") == {"username": "u", "password": "p"}
    await run("list")
    await run("list", "-ak", "given")
    await run("list", env={"HOSTLER_API_KEY": "named"})
    keys = [one["key"] for one in stand_in.requests("GET", "/v1/models")]
    assert keys == ["Bearer a-token", "Bearer given", "Bearer named"]


async def test_a_login_that_is_refused_or_not_needed(run: Shell, stand_in: StandIn) -> None:
    stand_in.answers["POST", "/token"] = Refusal(401, "Incorrect username or password.")
    refused = await run("login", "--username", "u", stdin="p\n")
    assert (refused.code, "Incorrect" in refused.err) == (1, True)
    stand_in.answers["GET", "/v1/cluster/auth"] = {"auth": False}
    assert "needs no login" in (await run("login")).out
    assert not (run.home / ".hostler").exists()


async def test_the_endpoint_of_other_scripts_is_honoured(run: Shell, stand_in: StandIn) -> None:
    other = {"HOSTLER_ENDPOINT": "", "XINFERENCE_ENDPOINT": stand_in.address}
    assert (await run("list", env=other)).code == 0
    assert (await run("list", env={"XINFERENCE_ENDPOINT": "http://127.0.0.1:1"})).code == 0
    assert (await run("list", "-e", stand_in.address, env={"HOSTLER_ENDPOINT": "http://127.0.0.1:1"})).code == 0


# --- memory


def test_memory_is_estimated_in_parts() -> None:
    result = run_here("cal-model-mem", "-s", "7", "-f", "pytorch", "-c", "16384", "-n", "qwen", "--json")
    found = json.loads(result.output)
    assert found["weights_bytes"] == 14_000_000_000
    assert found["total_bytes"] == sum(
        found[f"{part}_bytes"] for part in ("weights", "kv_cache", "activations", "engine")
    )
    table = run_here("cal-model-mem", "-s", "0_5", "-f", "ggufv2", "-q", "Q4_K_M", "-c", "4096").output
    assert [line.split()[0] for line in table.splitlines()] == [
        "PART",
        "weights",
        "kv",
        "activations",
        "engine",
        "total",
    ]


@pytest.mark.parametrize("size", ["many", "0", "-1", "nan"])
def test_a_size_that_is_none_is_told(size: str) -> None:
    result = run_here("cal-model-mem", f"-s={size}", "-f", "pytorch", "-c", "1")
    assert result.exit_code == 2
    assert "size" in result.output


# --- the other program's name


@pytest.mark.parametrize(
    ("program", "words", "ours"),
    [
        ("xinference", "launch -n m -en vllm", "launch -n m -en vllm"),
        ("xinference", "-H 0.0.0.0 -p 9000", "serve --host 0.0.0.0 --port 9000"),
        ("xinference", "", "serve"),
        ("xinference", "--version", "--version"),
        ("xinference", "--help", "--help"),
        ("xinference-local", "--host=::1 --log-level DEBUG -MH x -mp 1", "serve --host ::1 --log-level debug"),
        ("xinference-local", "--help", "serve --help"),
    ],
)
def test_words_of_the_other_program_are_translated(program: str, words: str, ours: str) -> None:
    assert translate(program, words.split()) == ours.split()


async def test_the_other_programs_name_runs_our_verbs(run: Shell, stand_in: StandIn) -> None:
    folder = run.home / "a folder"
    done = await run("alias", "xinference", "--dir", str(folder))
    assert done == (0, f"{folder}/xinference\n{folder}/xinference-local\n", "")
    process = await asyncio.create_subprocess_exec(
        str(folder / "xinference"),
        *("terminate", "--model-uid", "m"),
        env=run.environment() | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(LIMIT_S):
        out, _ = await process.communicate()
    assert (process.returncode, out) == (0, b"m is terminated.\n")
    assert (await run("alias", "xinference", "--dir", str(folder))).code == 0  # our own may be replaced


async def test_a_file_of_somebody_else_is_left_alone(run: Shell) -> None:
    theirs = run.home / "xinference-local"
    theirs.write_text("#!/bin/sh\necho theirs\n")
    done = await run("alias", "xinference", "--dir", str(run.home))
    assert done.code == 1
    assert f"{theirs} is there and is not ours" in done.err
    assert theirs.read_text() == "#!/bin/sh\necho theirs\n"
    assert not (run.home / "xinference").exists()


async def test_tables_fit_the_terminal(run: Shell) -> None:
    ours, theirs = pty.openpty()
    env = run.environment() | {"TERM": "xterm", "COLUMNS": "60"}
    process = await run.start("cached", stdout=theirs, env=env)
    os.close(theirs)
    async with asyncio.timeout(LIMIT_S):
        await process.communicate()
    shown = re.sub(r"\x1b\[[0-9;]*m", "", os.read(ours, 65536).decode())
    os.close(ours)
    assert max(len(line) for line in shown.splitlines()) <= 60


async def test_an_answer_that_breaks_off_is_told(run: Shell, stand_in: StandIn) -> None:
    stand_in.answers["POST", "/v1/completions"] = Raw(b'data: {"choices": [{"text": "half"}]}\r\n\r\n')
    done = await run("generate", "m", stdin="x\n")
    assert (done.code, done.out.strip(), "broke off" in done.err) == (1, "half", True)


# --- --json

# What these print is a text by nature, or JSON anyhow.
WITHOUT_JSON = {"serve", "logs", "chat", "schema", "config schema", "export"}


def leaves(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    with click.Context(command) as context:
        for verb in command.list_commands(context):
            below = command.get_command(context, verb)
            assert below is not None
            yield from leaves(below, f"{name} {verb}".strip())


def test_every_verb_prints_json_but_those_that_cannot() -> None:
    without = {name for name, leaf in leaves(hostler) if "as_json" not in {param.name for param in leaf.params}}
    assert without == WITHOUT_JSON


async def test_what_was_done_is_told_as_json(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    run = Shell(tmp_path, gateway.address)

    async def told(*words: str, stdin: str = "") -> Any:
        done = await run(*words, "--json", stdin=stdin)
        assert done.code == 0, done
        return json.loads(done.out)

    assert (await told("start", "fake"))["id"] == "fake"
    assert (await told("generate", "fake", stdin="x\n"))["object"] == "text_completion"
    assert (await told("stop", "fake"))["status"] == "stopped"
    path = str(tmp_path / "fake.gguf")
    assert await told("launch", "--model-path", path, "-u", "m") == {"model_uid": "m"}
    assert await told("scale", "m", "2") == {"model_uid": "m", "replica": 2, "replica_ids": [0, 1]}
    assert await told("terminate", "m") == {"model_uid": "m"}
    model = {"version": 2, "model_name": "mine", "model_family": "other", "model_lang": ["en"]}
    spec = {"model_format": "ggufv2", "model_size_in_billions": 1, "quantization": "q", "model_uri": path}
    model |= {"model_ability": ["generate"], "model_specs": [spec | {"model_file_name_template": "fake.gguf"}]}
    (tmp_path / "mine.json").write_text(json.dumps(model))
    assert "notes" in await told("register", str(tmp_path / "mine.json"))
    assert await told("unregister", "mine") == {"model_type": "LLM", "model_name": "mine"}
    assert await told("cache", "prune", "--check") == {"freed_bytes": 0, "removed": [], "kept": {}}
    assert await told("login") == {"endpoint": gateway.address, "token_file": None}
    assert len((await told("alias", "xinference", "--dir", str(tmp_path / "bin")))["files"]) == 2
    settings = gateway.home / "settings.yaml"
    assert (await told("config", "check", str(settings)))["models"]["fake"]["model_engine"] == "llama.cpp"
    asked = await run("cache", "prune", "--json")
    assert (asked.code, "--check" in asked.err) == (2, True)
