"""The settings: three places, one Struct, and sentences that name the place of what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engines.base import EngineSettings
from gateway.config import Group, Settings, check_exposure, load
from gateway.errors import SettingsError
from gateway.launch import LaunchRequest
from registry.decode import Secret


def load_text(
    tmp_path: Path, text: str, environment: dict[str, str] | None = None, *, ending: str = ".yaml", **flags: Any
) -> Settings:
    file = tmp_path / f"settings{ending}"
    file.write_text(text)
    return load(str(file), flags, environment or {})


def refusal(tmp_path: Path, text: str, environment: dict[str, str] | None = None, *, ending: str = ".yaml") -> str:
    with pytest.raises(SettingsError) as caught:
        load_text(tmp_path, text, environment, ending=ending)
    return str(caught.value)


# --- files


YAML = """
port: 8000
api_keys: [one, two]
engines:
  llama.cpp: {binary: /opt/llama-server}
models:
  small:
    model_name: qwen3
    gpu_idx: [0, 1]
    options: {n_parallel: 2}
    idle_timeout_s: 1.5
"""
TOML = """
port = 8000
api_keys = ["one", "two"]
[engines."llama.cpp"]
binary = "/opt/llama-server"
[models.small]
model_name = "qwen3"
gpu_idx = [0, 1]
idle_timeout_s = 1.5
options = {n_parallel = 2}
"""
JSON = """
{"port": 8000, "api_keys": ["one", "two"], "engines": {"llama.cpp": {"binary": "/opt/llama-server"}},
 "models": {"small": {"model_name": "qwen3", "gpu_idx": [0, 1], "options": {"n_parallel": 2}, "idle_timeout_s": 1.5}}}
"""


@pytest.mark.parametrize(("ending", "text"), [(".yaml", YAML), (".yml", YAML), (".toml", TOML), (".json", JSON)])
def test_every_format_gives_the_same_settings(ending: str, text: str, tmp_path: Path) -> None:
    assert load_text(tmp_path, text, ending=ending) == Settings(
        port=8000,
        api_keys=(Secret("one"), Secret("two")),
        engines={"llama.cpp": EngineSettings(binary="/opt/llama-server")},
        models={
            "small": LaunchRequest(model_name="qwen3", gpu_idx=(0, 1), options={"n_parallel": 2}, idle_timeout_s=1.5)
        },
    )


def test_without_any_place_there_are_the_defaults() -> None:
    assert load(None, {}, {}) == Settings()


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_gives_the_defaults(text: str, tmp_path: Path) -> None:
    assert load_text(tmp_path, text) == Settings()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("0_5", "0_5"),
        ("on", "on"),
        ("NO", "NO"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("007", "007"),
        ("'5'", "5"),
        ("5", 5),
        ("-5", -5),
        ("0x1f", 31),
        ("1.5", 1.5),
        ("true", True),
        ("False", False),
        ("~", None),
    ],
)
def test_yaml_words_mean_what_they_look_like(word: str, value: Any, tmp_path: Path) -> None:
    (read,) = load_text(tmp_path, f"models: {{m: {{options: {{x: {word}}}}}}}").models["m"].options.values()
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (".json", '{"$schema": "settings.schema.json", "port": 81}'),
        (".yaml", "$schema: settings.schema.json\nport: 81"),
    ],
)
def test_a_file_may_name_its_schema(ending: str, text: str, tmp_path: Path) -> None:
    assert load_text(tmp_path, text, ending=ending) == Settings(port=81)


@pytest.mark.parametrize(
    ("ending", "text", "words"),
    [
        (".yaml", "models: [", ["is not valid YAML"]),
        (".toml", "port = ", ["is not valid TOML"]),
        (".json", "{", ["is not valid JSON"]),
        (".yaml", "- port", ["holds list, not keys with values"]),
        (".json", "3", ["holds int, not keys with values"]),
        (".yaml", "? [a]\n: 1", ["is not valid YAML", "unhashable"]),
        (".ini", "port=1", ["ends in .yaml, .yml, .toml or .json"]),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named(ending: str, text: str, words: list[str], tmp_path: Path) -> None:
    said = refusal(tmp_path, text, ending=ending)
    assert [word for word in [f"settings{ending}", *words] if word not in said] == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.yaml cannot be read: .*No such file"):
        load(str(tmp_path / "nothing.yaml"), {}, {})


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot be read: .*Is a directory"):
        load(str(tmp_path), {}, {})


def test_a_file_that_is_not_utf8_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"host: \xff\xfe")
    with pytest.raises(SettingsError, match=r"a\.yaml cannot be read"):
        load(str(tmp_path / "a.yaml"), {}, {})


@pytest.mark.parametrize(
    "text",
    [
        "port: 1\nhost: a\nport: 2\n",
        "models:\n  a: {model_name: x}\n  a: {model_name: y}\n",
        "models: {a: {model_name: x, model_name: y}}\n",
    ],
)
def test_a_yaml_key_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    assert "stands twice" in refusal(tmp_path, text)


def test_a_yaml_key_that_stands_twice_in_the_environment_is_refused(tmp_path: Path) -> None:
    environment = {"HOSTLER_MODELS": "{a: {model_name: x}, a: {model_name: y}}"}
    assert "stands twice" in refusal(tmp_path, "", environment)


def test_yaml_may_merge_what_an_anchor_names(tmp_path: Path) -> None:
    text = """
models:
  a: &a {model_name: qwen3, preload: true}
  b: {<<: *a, preload: false}
"""
    models = load_text(tmp_path, text).models
    assert (models["b"].model_name, models["b"].preload) == ("qwen3", False)


def test_yaml_that_holds_itself_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path, "models: &m {a: *m}")


# --- what is wrong, and where


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", ["'prot'", "`$`", "Did you mean 'port'"]),
        ("zzzzzzzz: 1", ["'zzzzzzzz'", "Known keys: access_log, "]),
        ("1: 2", ["Unknown key 1", "`$`"]),
        ("models: {small: {model_nam: x}}", ["'model_nam'", "`$.models.small`", "Did you mean 'model_name'"]),
        ("models: {org/a.b: {replicas: 2}}", ["'replicas'", "`$.models.org/a.b`", "'replica'"]),
        ("engines: {llama.cpp: {binry: x}}", ["'binry'", "`$.engines.llama.cpp`", "Did you mean 'binary'"]),
    ],
)
def test_an_unknown_key_is_told_with_its_place_and_the_nearest_right_one(
    text: str, words: list[str], tmp_path: Path
) -> None:
    said = refusal(tmp_path, text)
    assert [word for word in ["settings.yaml", *words] if word not in said] == []


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        ("port: many", "`$.port`", "Expected `int`, got `str`"),
        ("port: 70000", "`$.port`", "65535"),
        ("host: [a]", "`$.host`", "Expected `str`, got `array`"),
        ("port: 1.5", "`$.port`", "Expected `int`, got `float`"),
        ("keepalive_interval_s: 0", "`$.keepalive_interval_s`", "> 0"),
        ("log_level: loud", "`$.log_level`", "debug|info|warning|error"),
        ("api_keys: [a, {b: c}]", "`$.api_keys[1]`", "Expected `str`"),
        ("engines: [llama.cpp]", "`$.engines`", "Expected `object`, got `array`"),
        ("engines: {llama.cpp: {binary: [x]}}", "`$.engines.llama.cpp.binary`", "got `array`"),
        ("models: 3", "`$.models`", "Expected `object`, got `int`"),
        ("models: {small: 3}", "`$.models.small`", "Expected `object`, got `int`"),
        ("models: {small: {replica: many}}", "`$.models.small.replica`", "Expected `int`, got `str`"),
        ("models: {small: {replica: 0}}", "`$.models.small.replica`", ">= 1"),
        ("models: {a.b: {options: [x]}}", "`$.models.a.b.options`", "Expected `object`, got `array`"),
        ("models: {small: {gpu_idx: [0, x]}}", "`$.models.small.gpu_idx[1]`", "Expected `int`, got `str`"),
        ("models: {small: {envs: {A: [b]}}}", "`$.models.small.envs.A`", "Expected `str`, got `array`"),
    ],
)
def test_a_wrong_value_is_told_with_its_exact_place(text: str, where: str, expected: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, text)
    assert [word for word in ("settings.yaml", where, expected) if word not in said] == []


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), inner, max_size=3)
        | st.dictionaries(st.sampled_from(LaunchRequest.__struct_encode_fields__), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(models=junk)
@example(models={"a": {"model_name": "${", "model_id": "${file:}", "envs": {"A": "${A:-"}}})
@example(models={"a": {"model_size_in_billions": 10**40, "replica": 10**40}})
@example(models={"a": {"options": {"n_ctx": "${file:/nowhere}"}}})
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_stands_for_the_models_there_are_settings_or_a_sentence(models: Any) -> None:
    with contextlib.suppress(SettingsError):
        settings = load(None, {"models": models}, {})
        assert isinstance(settings.models, dict)
        assert all(isinstance(request, LaunchRequest) for request in settings.models.values())


# --- what ${...} refers to


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${PLACE}", "here"),
        ("/a/${PLACE}/${PLACE}", "/a/here/here"),
        ("${MISSING:-there}", "there"),
        ("${PLACE:-there}", "here"),
        ("${MISSING:-}", ""),
        ("$${PLACE}", "${PLACE}"),
        ("$${MISSING}", "${MISSING}"),
        ("$PLACE", "$PLACE"),
        ("100 $", "100 $"),
    ],
)
def test_a_reference_is_put_in(text: str, expected: str, tmp_path: Path) -> None:
    assert load_text(tmp_path, f"host: '{text}'", {"PLACE": "here"}).host == expected


def test_references_are_put_in_everywhere(tmp_path: Path) -> None:
    text = "port: ${P}\nallowed_origins: ['${A}']\nmodels: {m: {model_name: '${A}', options: {x: ['${A}']}}}"
    settings = load_text(tmp_path, text, {"P": "81", "A": "a"})
    model = settings.models["m"]
    assert (settings.port, settings.allowed_origins) == (81, ("a",))
    assert (model.model_name, model.options) == ("a", {"x": ["a"]})


def test_references_in_environment_variables_are_put_in_too(tmp_path: Path) -> None:
    assert load_text(tmp_path, "", {"HOSTLER_HOME": "${BASE}/hostler", "BASE": "/srv"}).home == "/srv/hostler"


def test_a_reference_to_a_variable_that_is_not_set_says_so(tmp_path: Path) -> None:
    said = refusal(tmp_path, "models: {m: {model_path: '${MISSING}/a.gguf'}}")
    words = ["${MISSING}", "`$.models.m.model_path`", "not set", "${MISSING:-a default}"]
    assert [word for word in words if word not in said] == []


def test_a_reference_to_a_file_is_its_text_without_white_space_around(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from the file\n")
    text = f"api_keys: ['${{file:{tmp_path}/secret}}']"
    assert load_text(tmp_path, text).api_keys == (Secret("from the file"),)


def test_a_reference_to_a_missing_file_says_so(tmp_path: Path) -> None:
    said = refusal(tmp_path, "api_keys: ['${file:/nowhere/key}']")
    words = ["${file:/nowhere/key}", "`$.api_keys[0]`", "No such file"]
    assert [word for word in words if word not in said] == []


def test_a_reference_to_a_file_that_is_not_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    said = refusal(tmp_path, f"host: ${{file:{tmp_path}/binary}}")
    assert [word for word in ("binary", "`$.host`") if word not in said] == []


# --- file < environment < flags


def test_the_environment_goes_before_the_file_and_a_flag_before_both(tmp_path: Path) -> None:
    text, environment = "port: 1\nhost: file\nhome: /file", {"HOSTLER_PORT": "2", "HOSTLER_HOST": "environment"}
    settings = load_text(tmp_path, text, environment, port=3)
    assert (settings.port, settings.host, settings.home) == (3, "environment", "/file")


def test_a_flag_that_was_not_given_changes_nothing(tmp_path: Path) -> None:
    assert load_text(tmp_path, "port: 1", port=None, host=None).port == 1


# field -> the variable's text, and what comes of it
EVERY_FIELD: dict[str, tuple[str, Any]] = {
    "host": ("::1", "::1"),
    "port": ("81", 81),
    "home": ("/srv/hostler", "/srv/hostler"),
    "cache": ("123", "123"),
    "api_keys": ("one, 2,", (Secret("one"), Secret("2"))),
    "api_keys_file": ("{tmp_path}/keys", "{tmp_path}/keys"),
    "allowed_origins": ("https://a.example, https://b.example", ("https://a.example", "https://b.example")),
    "max_body_bytes": ("2048", 2048),
    "log_level": ("debug", "debug"),
    "door": ("plain", "plain"),
    "access_log": ("false", False),
    "keepalive_interval_s": ("0.5", 0.5),
    "drain_timeout_s": ("0", 0.0),
    "restart_drain_s": ("60", 60.0),
    "model_environments": ("false", False),
    "wheel_folders": ("/srv/wheels, ~/wheels", ("/srv/wheels", "~/wheels")),
    "environment_builder": ("pip", "pip"),
    "on_exit": ("keep", "keep"),
    "orphan_timeout_s": ("7", 7.0),
    "max_loaded": ("3", 3),
    "groups": ("{big: {exclusive: true}}", {"big": Group(exclusive=True)}),
    "ram_limit": ("48GiB", "48GiB"),
    "ram_headroom": ("2GiB", "2GiB"),
    "gpu_headroom": ("1GiB", "1GiB"),
    "sleep_memory": ("40%", "40%"),
    "min_residency_s": ("1", 1.0),
    "max_wait_s": ("5", 5.0),
    "queue_limit": ("7", 7),
    "watch_settings": ("false", False),
    "restart_limit": ("2", 2),
    "probe_interval_s": ("0.5", 0.5),
    "probe_failures": ("1", 1),
    "flexible_launchers": ("a.launcher, b.launcher", ("a.launcher", "b.launcher")),
    "allow_command_launches": ("true", True),
    "catalogue_files": ("/a.json, /b.json", ("/a.json", "/b.json")),
    "model_roots": ("/srv/models, ~/mine", ("/srv/models", "~/mine")),
    "allowed_hosts": ("models.example, hostler", ("models.example", "hostler")),
    "preferred_hubs": ("pypi, huggingface", ("pypi", "huggingface")),
    "download_stall_s": ("7", 7.0),
    "engines": ("{llama.cpp: {binary: /x}}", {"llama.cpp": EngineSettings(binary="/x")}),
    "models": ("{m: {model_name: qwen3}}", {"m": LaunchRequest(model_name="qwen3")}),
}


def test_the_list_of_all_settings_here_is_complete() -> None:
    assert set(EVERY_FIELD) == set(Settings.__struct_encode_fields__)
    changed = {field: value for field, (_, value) in EVERY_FIELD.items()}
    assert [field for field, value in changed.items() if getattr(Settings(), field) == value] == []


@pytest.mark.parametrize("field", EVERY_FIELD)
def test_every_setting_is_an_environment_variable(field: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("from the file\n")
    text, expected = EVERY_FIELD[field]
    if isinstance(expected, str):
        text, expected = text.format(tmp_path=tmp_path), expected.format(tmp_path=tmp_path)
    assert getattr(load(None, {}, {f"HOSTLER_{field.upper()}": text}), field) == expected


@pytest.mark.parametrize(
    ("environment", "is_on"),
    [({"XINFERENCE_ENABLE_VIRTUAL_ENV": "0"}, False), ({"XINFERENCE_ENABLE_VIRTUAL_ENV": "1"}, True), ({}, True),
     ({"XINFERENCE_ENABLE_VIRTUAL_ENV": "0", "HOSTLER_MODEL_ENVIRONMENTS": "true"}, True)],
)  # fmt: skip
def test_xinferences_variable_says_whether_models_get_environments(environment: dict[str, str], is_on: bool) -> None:
    assert load(None, {}, environment).model_environments is is_on


def test_folders_of_wheels_are_xinferences_or_else_in_the_data_folder(tmp_path: Path) -> None:
    assert load(None, {"home": str(tmp_path)}, {}).wheel_paths == (tmp_path / "wheels",)
    roots = {"XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS": f"/a{os.pathsep}/b,/c"}
    assert load(None, {}, roots).wheel_paths == (Path("/a"), Path("/b"), Path("/c"))
    assert load(None, {"wheel_folders": ["/d"]}, roots).wheel_paths == (Path("/d"),)


def test_a_variable_with_a_wrong_value_is_told_with_its_setting() -> None:
    with pytest.raises(SettingsError, match=r"Expected `int`, got `str` - at `\$\.port`"):
        load(None, {}, {"HOSTLER_PORT": "many"})


def test_a_variable_that_is_not_yaml_is_named() -> None:
    with pytest.raises(SettingsError, match="HOSTLER_MODELS is not valid YAML"):
        load(None, {}, {"HOSTLER_MODELS": "{a: "})


@pytest.mark.parametrize(
    ("variable", "right"),
    [
        ("HOSTLER_PROT", "HOSTLER_PORT"),
        ("HOSTLER_APIKEYS", "HOSTLER_API_KEYS"),
        ("HOSTLER_MODEL", "HOSTLER_MODELS"),
        ("HOSTLER_DRAIN_TIMEOUT", "HOSTLER_DRAIN_TIMEOUT_S"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_one(variable: str, right: str) -> None:
    with pytest.raises(SettingsError, match=f"has {variable}, which is no setting. Did you mean {right}\\?"):
        load(None, {}, {variable: "1"})


@pytest.mark.parametrize("variable", ["HOSTLER_ENDPOINT", "HOSTLER_SOMETHING_OF_MY_OWN", "PORT", "hostler_port"])
def test_a_variable_that_is_none_of_ours_is_left_alone(variable: str) -> None:
    assert load(None, {}, {variable: "1"}) == Settings()


# --- keys


def test_keys_of_the_file_are_joined_by_those_of_a_key_file_and_the_clients_variable(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\n\n  second  \nthird\n")
    text = f"api_keys: [first]\napi_keys_file: {tmp_path}/keys\n"
    settings = load_text(tmp_path, text, {"HOSTLER_API_KEY": "fourth"})
    assert settings.api_keys == ("first", "second", "third", "fourth")
    assert all(isinstance(key, Secret) for key in settings.api_keys)


def test_keys_in_the_environment_replace_those_of_the_file(tmp_path: Path) -> None:
    assert load_text(tmp_path, "api_keys: [a]", {"HOSTLER_API_KEYS": "b,c"}).api_keys == ("b", "c")


def test_keys_in_the_environment_may_be_a_yaml_list() -> None:
    assert load(None, {}, {"HOSTLER_API_KEYS": '["a,b", c]'}).api_keys == ("a,b", "c")


@pytest.mark.parametrize("text", ["", "# none yet\n\n"])
def test_a_key_file_without_a_key_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    assert "holds no key" in refusal(tmp_path, f"api_keys_file: {tmp_path}/keys")


def test_a_key_file_that_is_missing_is_named(tmp_path: Path) -> None:
    assert "/nowhere/keys cannot be read: No such file" in refusal(tmp_path, "api_keys_file: /nowhere/keys")


def test_a_key_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path}/keys cannot be read" in refusal(tmp_path, f"api_keys_file: {tmp_path}/keys")


@pytest.mark.parametrize("field", ["home", "cache", "api_keys_file"])
def test_an_unknown_home_folder_is_refused_with_its_setting(field: str, tmp_path: Path) -> None:
    assert field in refusal(tmp_path, f"{field}: ~no-such-user/x")


@pytest.mark.parametrize("text", ["api_keys: ['']", "api_keys: [a, '${MISSING:-}']"])
def test_an_empty_key_is_refused(text: str, tmp_path: Path) -> None:
    assert "empty key" in refusal(tmp_path, text)


def test_a_key_is_never_shown_by_the_settings(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-second\n")
    text = f"api_keys: [sk-first]\napi_keys_file: {tmp_path}/keys\n"
    settings = load_text(tmp_path, text, {"HOSTLER_API_KEY": "sk-third"})
    shown = f"{settings!r} {settings} {settings.api_keys} {msgspec.structs.astuple(settings)}"
    assert len(settings.api_keys) == 3
    assert "sk-" not in shown


@pytest.mark.parametrize(
    ("ending", "text", "environment"),
    [
        (".yaml", "api_keys: sk-secret", {}),
        (".yaml", "api_keys: {sk-secret: 1}", {}),
        (".yaml", "api_keys: [[sk-secret]]", {}),
        (".yaml", "api_keys: [sk-secret]\nprot: 1", {}),
        (".yaml", "api_keys: [sk-secret\nport: 1", {}),
        (".yaml", "{api_keys: [sk-secret], port: 1, port: 2}", {}),
        (".yaml", "api_key: sk-secret", {}),
        (".json", '{"api_keys": ["sk-secret"', {}),
        (".toml", 'api_keys = ["sk-secret"', {}),
        (".yaml", "", {"HOSTLER_API_KEYS": "[sk-secret"}),
        (".yaml", "", {"HOSTLER_API_KEYS": "[sk-secret, [sk-secret]]"}),
        (".yaml", "port: many", {"HOSTLER_API_KEY": "sk-secret"}),
    ],
)
def test_a_key_is_never_shown_by_an_error(ending: str, text: str, environment: dict[str, str], tmp_path: Path) -> None:
    assert "sk-secret" not in refusal(tmp_path, text, environment, ending=ending)


# --- who can reach it


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_on_loopback_no_key_is_needed(host: str) -> None:
    check_exposure(Settings(host=host), insecure=False)


BEYOND_LOOPBACK = ["0.0.0.0", "::", "", "192.168.1.5", "fe80::1", "example.org", "localhost.example.org", "0"]


@pytest.mark.parametrize("host", BEYOND_LOOPBACK)
def test_beyond_loopback_a_key_is_needed(host: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_exposure(Settings(host=host), insecure=False)
    words = [host, "no API key", "api_keys", "--insecure", "127.0.0.1"]
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("host", BEYOND_LOOPBACK)
def test_beyond_loopback_a_key_or_a_plain_word_is_enough(host: str) -> None:
    check_exposure(Settings(host=host, api_keys=(Secret("k"),)), insecure=False)
    check_exposure(Settings(host=host), insecure=True)


# --- folders


def test_the_cache_is_in_the_home_unless_told_otherwise(tmp_path: Path) -> None:
    assert Settings(home="/srv/h").cache_path == Path("/srv/h/cache")
    assert Settings(home="/srv/h", cache="/big").cache_path == Path("/big")


def test_folders_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert Settings(home="data", cache="~/cache").home_path == tmp_path / "data"
    assert Settings(home="data", cache="~/cache").cache_path == Path("/home/me/cache")


def test_the_settings_can_be_written_and_read_again_as_json(tmp_path: Path) -> None:
    settings = load_text(tmp_path, json.dumps({"port": 81, "models": {"m": {"model_name": "qwen3"}}}))
    assert load_text(tmp_path, msgspec.json.encode(settings).decode(), ending=".json") == settings
