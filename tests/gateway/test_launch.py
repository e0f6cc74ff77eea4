"""From a wish to a Launch: every choice, and every reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engines.base import Command, Endpoint, Engine, Launch, Placement
from gateway.api.wire import read_launch
from gateway.launch import RESERVED_UIDS, LaunchRequest, Site, check_uid, file_name, plan
from gateway.placement import needs_of
from registry.decode import decode
from registry.registry import Registry
from registry.resolve import Artifact, Selection
from registry.schema import LLMFamily, ModelSpec, Virtualenv


class KilnOptions(msgspec.Struct, forbid_unknown_fields=True):
    n_threads: int = 1
    flash_attn: bool = False


class Kiln(Engine, frozen=True, kw_only=True):
    """An engine that runs nothing: it says why not, if told so."""

    name = "kiln"
    model_types = ("LLM",)
    options = KilnOptions

    not_installed: str | None = None
    not_accepted: str | None = None

    def installed(self) -> str | None:
        return self.not_installed

    def accepts(self, artifact: Artifact) -> str | None:
        return self.not_accepted

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        return Command(argv=("true",))


def a_kiln(name: str = "kiln", model_types: tuple[str, ...] = ("LLM",), **refusals: str) -> Engine:
    named = {"name": name, "model_types": model_types}
    kind = msgspec.defstruct("Named", [], bases=(Kiln,), namespace=named, frozen=True, kw_only=True)
    return kind(**refusals)


def a_registry() -> Registry:
    specs = (
        ModelSpec(model_format="ggufv2", model_size_in_billions=1, quantization="q4_k_m", model_id="org/a"),
        ModelSpec(model_format="ggufv2", model_size_in_billions=1, quantization="q8_0", model_id="org/a"),
        ModelSpec(model_format="pytorch", model_size_in_billions=7, model_id="org/b"),
    )
    return Registry([LLMFamily(model_name="qwen", model_specs=specs)])


def a_plan(uid: str = "m", *engines: Engine, **wishes: Any) -> Launch:
    request = LaunchRequest(**({"model_name": "qwen"} | wishes))
    return plan(uid, request, a_registry(), engines or (a_kiln(),))


def refusal(*engines: Engine, **wishes: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (whose text is the result)
        a_plan("m", *engines, **wishes)
    return str(caught.value)


# --- all choices


def test_a_plan_holds_all_that_was_wished_for() -> None:
    launch = a_plan(
        "my/model",
        quantization="Q8_0",
        model_engine="KILN",
        replica=2,
        gpu_idx=(0, 1),
        n_gpu=1,
        options={"n_threads": 3},
        envs={"A": "b"},
        preload=True,
        idle_timeout_s=1.5,
        start_timeout_s=2.5,
        load_timeout_s=3.5,
    )
    assert launch == Launch(
        uid="my/model",
        artifact=launch.artifact,
        engine="kiln",
        replica=2,
        gpu_idx=(0, 1),
        n_gpu=1,
        options={"n_threads": 3},
        envs={"A": "b"},
        preload=True,
        idle_timeout_s=1.5,
        start_timeout_s=2.5,
        load_timeout_s=3.5,
        selection=Selection(model_name="qwen", quantization="Q8_0"),
    )
    assert (launch.artifact.spec.quantization, launch.artifact.source.model_id) == ("q8_0", "org/a")


def test_a_plan_without_wishes_has_the_first_spec_one_replica_and_no_preload() -> None:
    launch = a_plan()
    assert launch.artifact.spec.quantization == "q4_k_m"
    assert (launch.replica, launch.preload, launch.gpu_idx, launch.n_gpu) == (1, False, None, None)


def test_a_plan_survives_being_written_and_read() -> None:
    launch = a_plan(options={"n_threads": 3}, gpu_idx=(1,), idle_timeout_s=3)
    assert msgspec.json.decode(msgspec.json.encode(launch), type=Launch) == launch


def test_a_launch_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        a_plan().uid = "other"  # type: ignore[misc]


# --- the engine


def test_the_first_engine_that_can_is_chosen() -> None:
    engines = (
        a_kiln(name="one", not_accepted="it is too old"),
        a_kiln(name="two", not_installed="pip install two"),
        a_kiln(name="three", model_types=("image",)),
        a_kiln(name="four"),
        a_kiln(name="five"),
    )
    assert a_plan("m", *engines).engine == "four"


def test_an_engine_that_is_asked_for_goes_before_an_earlier_one() -> None:
    assert a_plan("m", a_kiln(name="one"), a_kiln(name="two"), model_engine="Two").engine == "two"


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (a_kiln(not_accepted="it loads clay"), "qwen (ggufv2) cannot run on kiln: it loads clay."),
        (a_kiln(not_installed="pip install kiln"), "qwen (ggufv2) cannot run on kiln: pip install kiln."),
        (a_kiln(model_types=("image",)), "qwen (ggufv2) cannot run on kiln: it serves image models, not LLM."),
    ],
    ids=["does not accept", "is not installed", "of another type"],
)
def test_an_engine_that_is_asked_for_and_refuses_says_why(engine: Kiln, reason: str) -> None:
    assert refusal(engine, a_kiln(name="other"), model_engine="kiln") == reason


def test_an_engine_that_there_is_not_is_told_with_the_nearest() -> None:
    said = refusal(a_kiln(name="llama.cpp"), a_kiln(name="vllm"), model_engine="lama.cpp")
    assert said == "There is no engine 'lama.cpp'. Did you mean 'llama.cpp'?"


def test_if_no_engine_can_the_reason_of_each_is_told() -> None:
    said = refusal(
        a_kiln(name="one", not_accepted="it loads clay"), a_kiln(name="two", not_installed="pip install two")
    )
    assert said == "No engine here can run qwen (ggufv2). one: it loads clay; two: pip install two."


def test_the_specs_format_is_what_the_engine_is_asked_about() -> None:
    said = refusal(a_kiln(not_accepted="no"), model_format="pytorch", model_engine="kiln")
    assert said.startswith("qwen (pytorch) cannot run")


# --- options, GPUs, names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_thread": 2}, ["'n_thread'", "`options`", "Did you mean 'n_threads'?"]),
        ({"FLASH_ATTN": True}, ["'FLASH_ATTN'", "Did you mean 'flash_attn'?"]),
        ({"zzzzzz": 1}, ["'zzzzzz'", "Known keys: flash_attn, n_threads."]),
        ({"n_threads": "many"}, ["`options.n_threads`", "Expected `int`, got `str`"]),
        ({"n_threads": None}, ["`options.n_threads`", "Expected `int`, got `null`"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], words: list[str]) -> None:
    said = refusal(options=options)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(("gpu_idx", "n_gpu"), [((0,), 2), ((0, 1), 1), ((), 1), ((0, 1), 0)])
def test_gpus_that_are_named_and_counted_differently_are_refused(gpu_idx: tuple[int, ...], n_gpu: int) -> None:
    assert refusal(gpu_idx=gpu_idx, n_gpu=n_gpu) == (
        f"gpu_idx names {len(gpu_idx)} GPUs, n_gpu says {n_gpu}: give one of them."
    )


@pytest.mark.parametrize(("gpu_idx", "n_gpu"), [((0, 1), None), ((0, 1), 2), (None, 2), (None, 0), ((), 0)])
def test_gpus_that_are_named_or_counted_are_taken(gpu_idx: tuple[int, ...] | None, n_gpu: int | None) -> None:
    launch = a_plan(gpu_idx=gpu_idx, n_gpu=n_gpu)
    assert (launch.gpu_idx, launch.n_gpu) == (gpu_idx, n_gpu)


@pytest.mark.parametrize(
    ("replica", "gpu_idx", "shares"),
    [
        (1, (0, 1), [(0, 1), (0, 1)]),  # a copy that is added later has what the first has
        (2, (0, 1), [(0,), (1,), (0,)]),
        (2, (3, 1, 2, 0), [(3, 1), (2, 0), (3, 1)]),
        (2, (), [(), ()]),
        (2, None, [None, None]),
    ],
)
def test_gpus_that_are_named_are_split_evenly_over_the_copies(
    replica: int, gpu_idx: tuple[int, ...] | None, shares: list[tuple[int, ...] | None]
) -> None:
    launch = a_plan(replica=replica, gpu_idx=gpu_idx)
    needs = a_kiln().needs(launch)
    assert [needs_of(launch, needs, index).gpu_idx for index in range(len(shares))] == shares


def test_gpus_that_cannot_be_split_evenly_are_refused() -> None:
    assert "Allocated gpu must be a multiple of replica" in refusal(replica=2, gpu_idx=(0, 1, 2))
    assert "2 for each copy, n_gpu says 4" in refusal(replica=2, gpu_idx=(0, 1, 2, 3), n_gpu=4)
    assert a_plan(replica=2, gpu_idx=(0, 1, 2, 3), n_gpu=2).n_gpu == 2


def test_a_gpu_that_is_named_twice_is_refused() -> None:
    assert "gpu_idx" in refusal(gpu_idx=(0, 0))


def test_a_model_that_there_is_not_is_told_with_the_nearest() -> None:
    assert refusal(model_name="qwem") == "No model is named 'qwem'. Did you mean 'qwen'?"


# --- the model's own environment


def a_model_with(*packages: str) -> Registry:
    spec = ModelSpec(model_format="pytorch", model_size_in_billions=1, model_id="org/a")
    return Registry([LLMFamily(model_name="qwen", model_specs=(spec,), virtualenv=Virtualenv(packages=packages))])


def planned(registry: Registry, *engines: Engine, site: Site | None = None, **wishes: Any) -> Launch:
    return plan("m", LaunchRequest(model_name="qwen", **wishes), registry, engines or (Kiln(),), (), site or Site())


def packages_of(launch: Launch) -> tuple[str, ...] | None:
    return launch.environment and launch.environment.packages


def test_a_launch_holds_the_environment_that_the_model_asks_for() -> None:
    launch = planned(a_model_with("clay>1", 'wood ; #engine# == "kiln"'))
    assert packages_of(launch) == ("clay>1", "wood")
    assert msgspec.json.decode(msgspec.json.encode(launch), type=Launch) == launch


@pytest.mark.parametrize(
    ("of_site", "of_launch", "has_one"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_a_launch_says_whether_there_is_one_else_the_site(of_site: bool, of_launch: bool | None, has_one: bool) -> None:
    launch = planned(a_model_with("clay"), site=Site(model_environments=of_site), enable_virtual_env=of_launch)
    assert (launch.environment is not None) is has_one


def test_packages_of_the_launch_go_before_those_of_the_model() -> None:
    assert packages_of(planned(a_model_with("clay==1", "wood"), virtual_env_packages=("clay==2",))) == (
        "wood",
        "clay==2",
    )
    assert packages_of(planned(a_registry(), virtual_env_packages=("clay==2",))) == ("clay==2",)


def test_packages_are_refused_where_environments_are_off() -> None:
    with pytest.raises(ValueError, match="environments of models are off"):
        planned(a_registry(), virtual_env_packages=("clay",), enable_virtual_env=False)


def test_an_engine_that_the_model_does_not_list_is_not_chosen() -> None:
    registry = a_model_with('clay ; #engine# == "two"')
    assert planned(registry, a_kiln(name="one"), a_kiln(name="two")).engine == "two"
    with pytest.raises(ValueError, match="Engine one is not listed in virtualenv packages for model qwen"):
        planned(registry, a_kiln(name="one"), a_kiln(name="two"), model_engine="one")


def test_an_engine_that_is_not_installed_runs_a_model_whose_environment_brings_it() -> None:
    engine = a_kiln(name="diffusers", not_installed="pip install diffusers")
    assert planned(a_model_with("diffusers==0.40"), engine).engine == "diffusers"
    assert planned(a_registry(), engine, enable_virtual_env=True).engine == "diffusers"
    with pytest.raises(ValueError, match="pip install diffusers"):
        planned(a_model_with("einops"), engine)
    with pytest.raises(ValueError, match="pip install diffusers"):
        planned(a_model_with("diffusers==0.40"), engine, enable_virtual_env=False)


def test_a_wrong_package_is_refused_with_its_sentence() -> None:
    with pytest.raises(ValueError, match=r"cannot run on kiln: '--pre' is no package"):
        planned(a_registry(), virtual_env_packages=("--pre",), model_engine="kiln")


def test_folders_of_wheels_are_below_one_that_the_site_allows(tmp_path: Path) -> None:
    inside = tmp_path / "wheels" / "mine"
    inside.mkdir(parents=True)
    (tmp_path / "wheels" / "out").symlink_to(tmp_path)
    site = Site(wheel_folders=(tmp_path / "wheels",))

    def refused(folder: Path | str) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (whose text is the result)
            planned(a_registry(), site=site, virtual_env_packages=("a",), virtual_env_find_links=(str(folder),))
        return str(caught.value)

    launch = planned(a_registry(), site=site, virtual_env_packages=("a",), virtual_env_find_links=(str(inside),))
    assert launch.environment is not None
    assert launch.environment.find_links == (str(inside),)
    assert "is no absolute path" in refused("wheels")
    assert "below none of the site's `wheel_folders`" in refused(tmp_path)
    assert "below none of the site's `wheel_folders`" in refused(tmp_path / "wheels" / "..")
    assert "below none of the site's `wheel_folders`" in refused(tmp_path / "wheels" / "out")
    assert "there is no folder" in refused(inside / "gone")


# --- uids


@pytest.mark.parametrize(
    "uid",
    [
        "a",
        "qwen2.5-instruct",
        "org/model",
        "a/b/c",
        "smollm2:135m",
        "user@host",
        "Modell-für-Übung",
        "模型",
        "🦙",
        ".hidden",
        "a..b",
        "a" * 100,
        "promptsx",
        "instances/a",
    ],
)
def test_a_uid_may_be(uid: str) -> None:
    check_uid(uid)
    assert a_plan(uid).uid == uid


@pytest.mark.parametrize(
    "uid",
    [
        "",
        " ",
        "a b",
        "-dash",
        " a",
        "a\n",
        "a\tb",
        "a\u00a0b",
        "/a",
        "a/",
        "a//b",
        "/",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/.",
        "a\\b",
        "a?b",
        "a%2Fb",
        "a#b",
        "a&b",
        "a=b",
        "a+b",
        "a" * 101,
        "模" * 67,  # 201 bytes
    ],
)
def test_a_uid_may_not_be(uid: str) -> None:
    with pytest.raises(ValueError, match="cannot name a model: 1 to 100 characters"):
        check_uid(uid)


def test_a_uid_that_is_refused_is_not_told_in_full() -> None:
    with pytest.raises(ValueError, match="cannot name a model") as caught:
        check_uid("a" * 10**6)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("uid", ["a\0b", "a\x1b[31mb", "a\x7f", "a\u202eb", "\ud800"])
def test_a_uid_has_nothing_in_it_that_does_not_print(uid: str) -> None:
    with pytest.raises(ValueError, match="cannot name a model"):
        check_uid(uid)


@pytest.mark.parametrize("uid", sorted(RESERVED_UIDS))
def test_a_word_of_the_api_is_no_uid(uid: str) -> None:
    with pytest.raises(ValueError, match=f"{uid!r} cannot name a model: the API uses that path"):
        a_plan(uid)


@pytest.mark.parametrize(
    "uid", ["a/start", "a/stop", "a/logs", "a/b/reload", "a/reload/config", "a/replicas/3", "a/requests/b/abort"]
)
def test_a_uid_does_not_end_like_what_is_below_a_model_in_the_api(uid: str) -> None:
    with pytest.raises(ValueError, match="cannot name a model"):
        check_uid(uid)


def is_legal(uid: str) -> bool:
    try:
        check_uid(uid)
    except ValueError:
        return False
    return True


uids = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.sampled_from("/.%2Fa"), min_size=1, max_size=12
).filter(is_legal)


@given(one=uids, other=uids)
def test_different_uids_have_different_file_names(one: str, other: str) -> None:
    assert (file_name(one) == file_name(other)) == (one == other)


@given(uid=uids)
def test_a_file_name_is_one_part_of_a_path(uid: str) -> None:
    assert Path("folder", file_name(uid)).parts == ("folder", file_name(uid))


@pytest.mark.parametrize(
    "uid",
    ["a" * 100, "a/" * 49 + "a", "模" * 66, "🦙" * 50],
    ids=["letters", "slashes", "wide letters", "signs"],
)
def test_the_longest_uids_still_name_a_file(uid: str, tmp_path: Path) -> None:
    check_uid(uid)
    (tmp_path / f"{file_name(uid)}.partial").write_text("written")
    assert [path.name for path in tmp_path.iterdir()] == [f"{file_name(uid)}.partial"]


@given(uid=st.text(max_size=120))
@hypothesis_settings(max_examples=200)
def test_any_text_is_a_short_uid_or_refused_with_a_sentence(uid: str) -> None:
    if not is_legal(uid):
        with pytest.raises(ValueError, match="cannot name a model"):
            check_uid(uid)
    else:
        assert 1 <= len(uid) <= 100


# --- as bodies say it


@pytest.mark.parametrize(
    ("device", "n_gpu", "options"),
    [("cpu", 0, {}), ("CPU:0", 0, {}), ("cuda:1", None, {"device": "cuda:1"}), (None, None, {})],
)
def test_the_device_of_a_body_is_the_cpu_or_an_option(device: str | None, n_gpu: int | None, options: Any) -> None:
    _, wish = read_launch({"model_name": "qwen", "device": device, "n_gpu": "auto"})
    assert (wish.n_gpu, wish.options) == (n_gpu, options)


@pytest.mark.parametrize(
    ("said", "n_gpu"), [({}, None), *(({"n_gpu": one}, got) for one, got in (("auto", None), (0, 0), ("0", 0), (2, 2)))]
)
def test_a_body_and_the_settings_say_the_number_of_gpus_alike(said: dict[str, Any], n_gpu: int | None) -> None:
    _, wish = read_launch({"model_name": "qwen", **said})
    settings = decode(said, LaunchRequest, "models.m", strict=False)
    for one in (wish, settings):
        assert a_plan(n_gpu=one.n_gpu).n_gpu == n_gpu


def test_null_as_the_number_of_gpus_of_a_body_is_the_cpu_as_in_xinference() -> None:
    for body, n_gpu, gpu_idx in (({"n_gpu": None}, 0, None), ({"n_gpu": None, "gpu_idx": [1]}, None, (1,))):
        _, wish = read_launch({"model_name": "qwen", **body})
        assert (wish.n_gpu, wish.gpu_idx) == (n_gpu, gpu_idx)


@pytest.mark.parametrize("n_gpu", [-1, "-1", "many", True, 1.5, []])
def test_what_is_no_number_of_gpus_is_refused_with_what_is(n_gpu: Any) -> None:
    with pytest.raises(ValueError, match="`n_gpu` must be greater than 0, or auto, or 0 or null for the CPU"):
        read_launch({"model_name": "qwen", "n_gpu": n_gpu})
    with pytest.raises(ValueError, match=r"models\.m\.n_gpu"):
        decode({"n_gpu": n_gpu}, LaunchRequest, "models.m", strict=False)


def test_a_device_means_nothing_to_an_engine_that_has_no_such_option() -> None:
    assert a_plan("m", options={"device": "cuda"}).options == {}
