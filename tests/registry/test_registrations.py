"""Registering and unregistering: names, conflicts, addresses, files on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import TEMPLATES, VIRTUALENV, template, with_spec

import registry.registry as module
from registry.registry import REGISTRABLE, Registered, RegistrationRefused, Registry
from registry.resolve import Selection, inherited, resolve
from registry.schema import LLMFamily, ModelSpec, Source, encode_family

ROOT = Path(__file__).parents[2]
TOOLER = LLMFamily(
    model_name="tooler",
    model_specs=(ModelSpec(model_format="pytorch", model_id="o/tooler"),),
    model_ability=("chat", "tools", "vision"),
    model_family="tooler",
    chat_template="{{ messages }}",
    stop=("</s>",),
    stop_token_ids=(2,),
    reasoning_start_tag="<think>",
    reasoning_end_tag="</think>",
    architectures=("ToolerForCausalLM",),
    tool_parser="tooler",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registrations"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of model files."""
    path = tmp_path / "my files"
    path.mkdir()
    (path / "m-Q4_0.gguf").write_bytes(b"GGUF")
    return path


def registry_with_tooler(folder: Path | None = None) -> Registry:
    return Registry([TOOLER], folder=folder)


def refusal_of(model_type: str, model: Any, registry: Registry | None = None, *, persist: bool = False) -> str:
    registry = registry or registry_with_tooler()
    before = {t: registry.names(t) for t in registry.types}
    with pytest.raises(RegistrationRefused) as caught:
        registry.register(model_type, model, persist=persist)
    assert {t: registry.names(t) for t in registry.types} == before
    said = str(caught.value)
    assert len(said) < 2000
    return said


def registered(model_type: str = "LLM", registry: Registry | None = None, **changes: Any) -> Registered:
    return (registry or registry_with_tooler()).register(model_type, template(model_type, **changes), persist=False)


# --- a life


@pytest.mark.parametrize("model_type", REGISTRABLE)
def test_a_registration_is_found_until_it_is_unregistered(model_type: str, folder: Path, files: Path) -> None:
    data = template(model_type, f"file://{files}".replace(" ", "%20"))
    name = data["model_name"]
    registry = registry_with_tooler(folder)

    answer = registry.register(model_type, json.dumps(data), persist=True)

    assert answer.lifted == ()
    assert registry.find(name, model_type) is answer.family
    assert name in registry.names(model_type)
    assert answer.family in registry.list(model_type)
    assert not registry.is_builtin(answer.family)
    path = folder / model_type.lower() / f"{name}.json"
    assert json.loads(path.read_bytes()) == encode_family(answer.family)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    artifact = resolve(registry, Selection(model_name=name, model_type=model_type))
    assert artifact.local_path == files
    again = registry_with_tooler(folder)
    assert again.problems == []
    assert again.find(name, model_type) == answer.family

    assert registry.unregister(model_type, name) is True
    assert registry.find(name, model_type) is None
    assert not path.exists()
    assert registry.unregister(model_type, name) is False
    assert registry_with_tooler(folder).find(name, model_type) is None


def test_without_persist_it_is_gone_at_the_next_start(folder: Path) -> None:
    registry = registry_with_tooler(folder)
    registered(registry=registry)
    assert not folder.exists()
    assert registry_with_tooler(folder).names() == ("tooler",)


def test_it_can_be_registered_again_after_it_was_unregistered(folder: Path) -> None:
    registry = registry_with_tooler(folder)
    for _ in range(2):
        registry.register("LLM", template("LLM"), persist=True)
        assert registry.unregister("LLM", "custom-qwen-2.5")


def test_one_name_may_be_of_several_types() -> None:
    registry = registry_with_tooler()
    for model_type in REGISTRABLE:
        registered(model_type, registry, model_name="one")
        registered(model_type, registry, model_name="tooler") if model_type != "LLM" else None
    assert all(registry.find("one", model_type) for model_type in REGISTRABLE)


def test_a_registration_is_never_built_in() -> None:
    assert registered(is_builtin=True).family.is_builtin is False


# --- refusals


@pytest.mark.parametrize("model_type", ["video", "world", "llm", "Embedding", "", "LLM ", "../LLM", "x" * 10**5])
def test_other_types_are_refused(model_type: str) -> None:
    said = refusal_of(model_type, template("LLM"))
    assert said.startswith(f"Unsupported model type: {model_type[:100]}")
    assert "LLM" in said or "'embedding'" in said


def test_a_taken_name_is_refused(folder: Path) -> None:
    registry = registry_with_tooler(folder)
    registered(registry=registry)
    said = refusal_of("LLM", template("LLM"), registry)
    assert said.startswith("Model custom-qwen-2.5 already registered. Unregister it first")
    said = refusal_of("LLM", template("LLM", model_name="tooler"), registry)
    assert said.startswith("Model name conflicts with existing model tooler. Choose another")


def test_a_built_in_model_cannot_be_unregistered() -> None:
    with pytest.raises(RegistrationRefused, match="Model tooler is built-in"):
        registry_with_tooler().unregister("LLM", "tooler")
    with pytest.raises(RegistrationRefused, match="Unsupported model type: world"):
        registry_with_tooler().unregister("world", "x")
    assert registry_with_tooler().unregister("video", "x") is False


@pytest.mark.parametrize("name", ["my-bge-large-zh-v1.5", "模型", "a", ".hidden", "...", "a:b", "x" * 100, "q'\"*|<>~"])
def test_names_that_are_taken(name: str, folder: Path) -> None:
    registry = registry_with_tooler(folder)
    registry.register("LLM", template("LLM", model_name=name), persist=True)
    again = registry_with_tooler(folder)
    assert again.problems == []
    assert again.find(name)
    assert again.unregister("LLM", name)
    assert list((folder / "llm").iterdir()) == []


BAD_NAMES = [
    "",
    ".",
    "..",
    "a b",
    "a\tb",
    "a\n",
    "a/b",
    "../up",
    "/abs",
    "a\\b",
    "a?",
    "a%41",
    "a#",
    "a&b",
    "a=b",
    "a+b",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "a\0b", "a\x1bb", "\u3000", "x" * 101, "模" * 70, "\ud800"])
def test_names_that_are_refused(name: str, folder: Path) -> None:
    data = template("LLM", model_name=name)
    said = refusal_of("LLM", data, registry_with_tooler(folder), persist=True)
    assert said.startswith("Invalid model name ") or "surrogate" in said
    assert not folder.exists()


@pytest.mark.parametrize("model_type", ["LLM", "audio", "image"])
@pytest.mark.parametrize("family", [None, "", "  "])
def test_a_model_family_is_demanded(model_type: str, family: str | None) -> None:
    said = refusal_of(model_type, template(model_type, model_family=family))
    assert said.startswith(f"You must specify `model_family` when registering custom {model_type} models. ")


@pytest.mark.parametrize(
    ("model_type", "model", "words"),
    [
        ("LLM", "{", ["not JSON", "line 1"]),
        ("LLM", "", ["not JSON"]),
        ("LLM", b"\xff", ["UTF-8"]),
        ("LLM", "[]", ["Expected an object"]),
        ("LLM", "null", ["Expected an object"]),
        ("LLM", '"{}"', ["Expected an object"]),
        ("LLM", "{}", ["'model_name' is missing"]),
        ("LLM", {"model_name": 5}, ["Expected `str`, got `int`", "`$.model_name`"]),
        ("LLM", {"model_name": ["x"]}, ["`$.model_name`"]),
        ("LLM", '{"model_name": "a", "model_name": "b"}', ["Key 'model_name' is there twice"]),
        ("LLM", "[" * 1000 + "]" * 1000, ["deeper than 64"]),
        ("LLM", template("LLM", note=[[[]]] * 10) | {"deep": json.loads("[" * 900 + "]" * 900)}, ["deeper than 64"]),
        ("LLM", json.dumps(template("LLM", note="x" * 2**20)), ["longer than 1 MiB"]),
        ("LLM", template("LLM", model_specs=[{}] * 2000), ["2000 specs", "1000 at most"]),
        ("LLM", template("LLM", model_ability=["fly"]), ["'fly'", "`$.model_ability[0]`", "Allowed: embed, generate"]),
        ("LLM", template("LLM", version=3), ["Expected version 2"]),
        ("LLM", with_spec("LLM", model_format="ggmlv3"), ["'ggmlv3'", "Allowed: pytorch"]),
        ("LLM", with_spec("LLM", model_size_in_billions="x"), ["'x'", "such as 7"]),
        ("embedding", template("embedding", dimensions=None), ["'dimensions' is missing"]),
        ("audio", template("audio", multilingual=None), ["'multilingual' is missing"]),
        ("flexible", template("flexible", launcher=None), ["'launcher' is missing"]),
        ("flexible", template("flexible", launcher_args="not json"), ["`$.launcher_args`"]),
        ("LLM", template("LLM", cache_config="nonsense"), ["`$.cache_config`"]),
        ("LLM", template("LLM", virtualenv=VIRTUALENV | {"packages": "x"}), ["`$.virtualenv.packages`"]),
    ],
)
def test_what_is_wrong_is_told(model_type: str, model: Any, words: list[str]) -> None:
    said = refusal_of(model_type, model)
    for word in words:
        assert word in said


# --- addresses


def test_an_address_in_each_form(files: Path) -> None:
    gguf = f"{files}/m-Q4_0.gguf"
    for model_format, uri in [
        ("pytorch", str(files)),
        ("pytorch", f"file://{files}"),
        ("pytorch", f"file://{files}".replace(" ", "%20")),
        ("pytorch", f"FILE://localhost{files}"),
        ("awq", f"{files}/"),
        ("ggufv2", gguf),
        ("ggufv2", f"{files}/*.gguf"),
        ("ggufv2", f"{files}/m-*.gguf"),
    ]:
        registry = registry_with_tooler()
        registry.register("LLM", with_spec("LLM", model_format=model_format, model_uri=uri), persist=False)
        artifact = resolve(registry, Selection(model_name="custom-qwen-2.5"))
        assert artifact.source.model_hub == "local"
        if "*" in uri:
            assert artifact.source == Source(model_hub="local", model_id=str(files), files=(uri.rpartition("/")[2],))
        else:
            assert str(artifact.local_path) in (str(files), gguf)


@pytest.mark.parametrize("model_type", REGISTRABLE)
@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models/x", ["Model URI cannot be a relative path: models/x", "absolute path"]),
        ("./x", ["Model URI cannot be a relative path: ./x"]),
        ("~/x", ["Model URI cannot be a relative path: ~/x"]),
        ("file://x/y", ["Model URI cannot be a relative path: file://x/y"]),
        ("file://", ["Model URI cannot be a relative path"]),
        ("/a\0b", ["Model URI cannot be a relative path"]),
        ("/nowhere/at/all", ["Invalid model URI /nowhere/at/all", "no such file or folder"]),
        ("file:///nowhere%20", ["Invalid model URI file:///nowhere%20"]),
        ("/nowhere/*.gguf", ["Invalid model URI /nowhere/*.gguf"]),
        ("/" + "x" * 5000, ["Invalid model URI /xxx"]),
        ("/" + "x/" * 50000, ["Invalid model URI /x/"]),
        ("", ["Invalid model URI ''"]),
    ],
)
def test_an_address_of_nothing_is_refused(model_type: str, uri: str, words: list[str]) -> None:
    said = refusal_of(model_type, template(model_type, uri))
    for word in words:
        assert word in said


def test_a_near_path_is_shown(files: Path) -> None:
    said = refusal_of("LLM", template("LLM", f"{files}s"))
    assert f"Did you mean '{files}'?" in said


def test_other_schemes_register_and_fail_at_launch() -> None:
    registry = registry_with_tooler()
    answer = registry.register("LLM", template("LLM", "s3://bucket/m"), persist=False)
    assert "registered but not launched" in answer.lifted[0]
    with pytest.raises(ValueError, match="Unsupported URL scheme: 's3'"):
        resolve(registry, Selection(model_name="custom-qwen-2.5"))


def test_a_folder_of_gguf_holds_the_file_of_its_template(files: Path) -> None:
    spec: dict[str, Any] = {"model_format": "ggufv2", "model_uri": str(files)}
    fitting = with_spec("LLM", **spec, quantization="q4_0", model_file_name_template="m-{quantization}.gguf")
    assert registry_with_tooler().register("LLM", fitting, persist=False).lifted == ()
    said = refusal_of(
        "LLM", with_spec("LLM", **spec, quantization="Q8_0", model_file_name_template="m-{quantization}.gguf")
    )
    assert said.startswith(f"Invalid model URI {files}. The folder holds no m-Q8_0.gguf. It has: m-Q4_0.gguf.")
    (files / "b-00001-of-00002.gguf").write_bytes(b"GGUF")
    parts = {
        "quantization": "Q8_0",
        "quantization_parts": {"Q8_0": ["00001-of-00002", "00002-of-00002"]},
        "model_file_name_split_template": "b-{part}.gguf",
    }
    registry_with_tooler().register("LLM", with_spec("LLM", **spec, **parts), persist=False)


def test_a_file_where_a_folder_belongs_is_told(files: Path) -> None:
    answer = registered(uri=f"{files}/m-Q4_0.gguf")
    assert "model_format 'ggufv2'" in answer.lifted[0]


def test_no_address_at_all_is_told() -> None:
    assert "names no files" in registered().lifted[0]
    assert "model_specs is empty" in registered(model_specs=[]).lifted[0]


# --- what is told and what is lent


def test_older_forms_are_lifted_and_told() -> None:
    data = template("LLM", version=1, prompt_style={"stop": ["x"]})
    data["model_specs"][0] |= {"quantizations": ["4-bit", "none"], "quantization": None, "model_id": "o/m"}
    answer = registry_with_tooler().register("LLM", data, persist=False)
    assert [spec.quantization for spec in answer.family.specs] == ["none"]
    assert len(answer.lifted) == 3
    assert answer.family.extra == {"prompt_style": {"stop": ["x"]}}


def test_misspelt_keys_are_told() -> None:
    data = template("LLM", chat_templat="x", my_note="y")
    data["model_specs"][0] |= {"quantizaton": "x", "model_id": "o/m"}
    said = "\n".join(registry_with_tooler().register("LLM", data, persist=False).lifted)
    assert "'chat_templat' of the model means nothing here and is kept. Did you mean 'chat_template'?" in said
    assert (
        "'quantizaton' of `$.model_specs[0]` means nothing here and is left out. Did you mean 'quantization'?" in said
    )
    assert "my_note" not in said


def test_thousands_of_unknown_keys_take_no_time() -> None:
    started = time.perf_counter()
    answer = registered(**{f"model_nam{n}": n for n in range(10**4)})
    assert len(answer.lifted) < 50
    assert time.perf_counter() - started < 5


def test_a_family_that_is_not_known_is_told_where_it_matters() -> None:
    said = "\n".join(registered(model_ability=["chat", "tools", "vision"], model_family="mine").lifted)
    assert "model_family 'mine' is not a built-in model: whether tools works" in said
    assert "whether vision works" in said
    assert not any(
        "model_family" in s for s in registered(model_ability=["chat", "tools"], model_family="tooler").lifted
    )
    assert not any("model_family" in s for s in registered(model_ability=["chat"], model_family="other").lifted)


def test_what_a_registration_leaves_out_its_family_lends() -> None:
    registry = registry_with_tooler()
    family = registered(registry=registry, model_family="Tooler", model_ability=["chat"]).family
    lent = inherited(registry, family)
    assert isinstance(lent, LLMFamily)
    for field in ("chat_template", "stop", "stop_token_ids", "reasoning_start_tag", "tool_parser", "architectures"):
        assert getattr(family, field) is None
        assert getattr(lent, field) == getattr(TOOLER, field)
    assert lent.model_ability == ("chat", "vision")
    assert registry.find("custom-qwen-2.5") is family
    assert inherited(registry, TOOLER) is TOOLER


def test_what_a_registration_says_itself_is_not_lent() -> None:
    registry = registry_with_tooler()
    own = {"stop": [], "stop_token_ids": [1], "tool_parser": "own", "architectures": ["Own"], "chat_template": "{% %}"}
    lent = inherited(registry, registered(registry=registry, model_family="tooler", **own).family)
    assert isinstance(lent, LLMFamily)
    assert (lent.stop, lent.stop_token_ids, lent.tool_parser) == ((), (1,), "own")
    assert (lent.architectures, lent.chat_template) == (("Own",), "{% %}")


def test_a_template_that_is_a_models_name_brings_its_stops_along() -> None:
    registry = registry_with_tooler()
    family = registered(registry=registry, model_family="other", chat_template="tooler", stop=["mine"]).family
    lent = inherited(registry, family)
    assert isinstance(lent, LLMFamily)
    assert (lent.chat_template, lent.stop, lent.tool_parser) == ("{{ messages }}", ("</s>",), None)


def test_a_template_that_is_no_template_is_not_used() -> None:
    registry = registry_with_tooler()
    answer = registered(registry=registry, model_family="other", chat_template="qwen-chat")
    assert any("neither a Jinja template nor" in sentence for sentence in answer.lifted)
    lent = inherited(registry, answer.family)
    assert isinstance(lent, LLMFamily)
    assert lent.chat_template is None


# --- files


def test_a_damaged_or_conflicting_file_is_told_skipped_and_left(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_type = folder / "llm"
    of_type.mkdir(parents=True)
    good = json.dumps(template("LLM", model_name="good", model_uri=None))
    bad = {
        "broken.json": "{",
        "conflict.json": json.dumps(template("LLM", model_name="conflict") | {"model_name": "tooler"}),
        "tooler.json": json.dumps(template("LLM", model_name="tooler")),
        "twice.json": '{"model_name": "a", "model_name": "b"}',
        "wrong.json": json.dumps(template("LLM", model_name="wrong", model_ability=["fly"])),
        "empty.json": "",
    }
    for name, text in {**bad, "good.json": good}.items():
        (of_type / name).write_text(text)
    (of_type / "folder.json").mkdir()
    (of_type / "notes.txt").write_text("x")

    registry = registry_with_tooler(folder)

    assert registry.names() == ("tooler", "good")
    assert len(registry.problems) == len(bad) + 1
    for name in [*bad, "folder.json"]:
        assert sum(f"/{name} is skipped: " in problem for problem in registry.problems) == 1
    assert len(caplog.records) == len(registry.problems)
    assert {name: (of_type / name).read_text() for name in bad} == bad
    said = refusal_of("LLM", template("LLM", model_name="broken"), registry, persist=True)
    assert "Model broken already registered: there is a file broken.json" in said
    assert (of_type / "broken.json").read_text() == "{"
    assert registry.unregister("LLM", "broken") is False
    assert (of_type / "broken.json").exists()


def test_a_damaged_file_outlives_a_registration_of_its_name_in_memory(folder: Path) -> None:
    (folder / "llm").mkdir(parents=True)
    (folder / "llm" / "a.json").write_text("{")
    registry = registry_with_tooler(folder)
    registered(registry=registry, model_name="a")
    assert registry.unregister("LLM", "a")
    assert (folder / "llm" / "a.json").read_text() == "{"


def test_a_registration_whose_files_have_gone_is_kept_and_told(folder: Path, files: Path) -> None:
    data = with_spec("LLM", model_format="ggufv2", model_uri=f"{files}/m-Q4_0.gguf")
    registry_with_tooler(folder).register("LLM", data, persist=True)
    (files / "m-Q4_0.gguf").unlink()
    registry = registry_with_tooler(folder)
    assert registry.find("custom-qwen-2.5")
    assert "cannot be launched as it is: Invalid model URI" in registry.problems[0]


def test_a_file_in_an_older_form_is_taken(folder: Path) -> None:
    of_type = folder / "embedding"
    of_type.mkdir(parents=True)
    flat = {"model_name": "e", "dimensions": 4, "max_tokens": 8, "language": ["en"], "model_id": "o/e"}
    (of_type / "e.json").write_text(json.dumps(flat))
    registry = registry_with_tooler(folder)
    assert registry.problems == []
    assert registry.find("e", "embedding")


def test_a_folder_that_cannot_be_written_to_changes_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    registry = Registry([TOOLER], folder=tmp_path / "fine")
    registry._folder = blocked
    with pytest.raises(OSError, match="blocked"):
        registry.register("LLM", template("LLM"), persist=True)
    assert registry.names() == ("tooler",)
    with pytest.raises(RegistrationRefused, match="persist false"):
        Registry([TOOLER]).register("LLM", template("LLM"), persist=True)


def test_a_filesystem_without_links_is_no_hindrance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    registry_with_tooler(folder).register("LLM", template("LLM"), persist=True)
    other = registry_with_tooler(folder)
    assert other.find("custom-qwen-2.5")
    other._registered["LLM"].clear()
    assert "already registered" in refusal_of("LLM", template("LLM"), other, persist=True)
    assert len(list((folder / "llm").iterdir())) == 1


def test_leftovers_of_killed_writers_are_removed_in_time(folder: Path) -> None:
    of_type = folder / "llm"
    of_type.mkdir(parents=True)
    old, new = of_type / ".register-a.partial", of_type / ".register-b.partial"
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (0, 0))
    assert registry_with_tooler(folder).problems == []
    assert [path.name for path in of_type.iterdir()] == [new.name]


def test_of_two_registrations_at_once_one_wins(folder: Path) -> None:
    """By threads of one process, and by two registries, which stand for two processes."""
    registries = [registry_with_tooler(folder), registry_with_tooler(folder)]
    outcomes: list[str] = []
    refusals: list[str] = []
    barrier = threading.Barrier(8)

    def register(number: int) -> None:
        barrier.wait()
        try:
            data = template("LLM", model_description=str(number))
            registries[number % 2].register("LLM", data, persist=True)
            outcomes.append(str(number))
        except RegistrationRefused as exc:
            refusals.append(str(exc))

    threads = [threading.Thread(target=register, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert ["already registered" in said for said in refusals] == [True] * 7
    (path,) = (folder / "llm").iterdir()
    assert json.loads(path.read_bytes())["model_description"] == outcomes[0]


WRITER = """
import sys, json
from pathlib import Path
from registry.registry import Registry
registry = Registry(folder=Path(sys.argv[1]))
data = json.loads(sys.argv[2]) | {"chat_template": "{{ x }}" * 20000}
print("ready", flush=True)
for number in range(10**6):
    registry.register("LLM", data | {"model_name": f"m{number}"}, persist=True)
    if number % 3 == 0:
        registry.unregister("LLM", f"m{number}")
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.03, 0.071, 0.15])
def test_a_kill_at_any_moment_leaves_whole_files_only(folder: Path, delay_s: float) -> None:
    argv = [sys.executable, "-c", WRITER, str(folder), json.dumps(template("LLM"))]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        told = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    registry = Registry(folder=folder)
    assert registry.problems == []
    kept = {f"m{number}" for number in told if number % 3}
    assert kept <= set(registry.names())
    assert len(set(registry.names()) - kept) <= 1
    assert not {f"m{number}" for number in told if number % 3 == 0} & set(registry.names())


# --- anything


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(REGISTRABLE).flatmap(
        lambda t: st.tuples(
            st.just(t), st.dictionaries(st.sampled_from([*sorted(TEMPLATES[t]), "other"]), plain, max_size=3)
        )
    )
)
def test_any_change_is_registered_or_refused_with_a_sentence(case: tuple[str, dict[str, Any]]) -> None:
    model_type, changes = case
    registry = registry_with_tooler()
    try:
        said, answer = "", registry.register(model_type, template(model_type) | changes, persist=False)
    except RegistrationRefused as exc:
        said, answer = str(exc), None
    if answer is None:
        assert said
        return
    assert registry.find(answer.family.model_name, model_type) is answer.family
    assert all(sentence[-1] in ".?" for sentence in answer.lifted)


@given(st.text(max_size=20))
def test_any_name_stays_within_the_folder(name: str) -> None:
    registry = registry_with_tooler()
    try:
        registry.register("LLM", template("LLM", model_name=name), persist=False)
    except RegistrationRefused:
        return
    registry._folder = Path("/data")
    path = registry._path("LLM", name)
    assert path.parent == Path("/data/llm")
    assert Path(os.path.normpath(path)) == path


def test_the_limits_are_what_the_texts_say() -> None:
    assert (module.MAX_NAME_CHARACTERS, module.MAX_FILE_NAME_BYTES) == (100, 200)
