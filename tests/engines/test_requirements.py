"""The packages that a model asks for, resolved: markers, what `#...#` stands for, which of two wishes wins."""

from __future__ import annotations

import pytest

from engines.requirements import Facts, engines_named, is_satisfied, resolve

FACTS = Facts(python_version="3.11.7", installed={"torch": "2.13.0+cpu", "numpy": "2.4.6"})
ON_GPU = Facts(python_version="3.11.7", cuda_version="12.8")
NEEDS = {"vllm": ("vllm==1.0", "torch==2.13.0")}


def resolved(*entries: str, engine: str = "vLLM", facts: Facts = FACTS) -> tuple[str, ...]:
    return resolve(entries, engine, facts, NEEDS)


@pytest.mark.parametrize(
    ("entry", "result"),
    [
        ("numpy", ("numpy",)),
        ("  numpy<2 ", ("numpy<2",)),
        ("a[b,c]>=1,<2", ("a[b,c]>=1,<2",)),
        ("git+https://x.example/a.git@v1#egg=a", ("git+https://x.example/a.git@v1#egg=a",)),
        ("a @ https://x.example/a-1-py3-none-any.whl", ("a @ https://x.example/a-1-py3-none-any.whl",)),
        ("/wheels/a-1-py3-none-any.whl", ("/wheels/a-1-py3-none-any.whl",)),
        ("#system_torch#", ("torch==2.13.0+cpu",)),
        ('#system_numpy# ; #engine# == "vllm"', ("numpy==2.4.6",)),
        ("#vllm_dependencies#", ("vllm==1.0", "torch==2.13.0")),
        ("#sglang_dependencies#", ()),
        ('#vllm_dependencies# ; #engine# == "sglang"', ()),
        ('a ; #engine# == "vllm"', ("a",)),
        ('a ; #engine# == "VLLM"', ("a",)),
        ("a;#engine#=='vllm'", ("a",)),
        ('a ; #model_engine# == "vllm"', ("a",)),
        ('a ; #engine# == "sglang"', ()),
        ('a ; #engine# != "sglang"', ("a",)),
        ('a ; #engine# == "vllm" or #engine# == "sglang"', ("a",)),
        ('a ; #engine# == "vllm" and sys_platform == "nowhere"', ()),
        ('a ; sys_platform != "nowhere"', ("a",)),
        ('a ; python_version < "3.12"', ("a",)),
        ('a ; python_full_version == "3.11.7"', ("a",)),
        ('a ; python_version < "3.11"', ()),
        ('a ; cuda_version < "13.0"', ()),
        ('a ; cuda_version >= "0"', ()),
        ('https://x.example/a.whl ; #engine# == "sglang"', ()),
    ],
)
def test_an_entry_becomes(entry: str, result: tuple[str, ...]) -> None:
    assert resolved(entry) == result


@pytest.mark.parametrize(
    ("marker", "holds"),
    [('cuda_version < "13.0"', True), ('cuda_version >= "12.8"', True), ('cuda_version == "13.0"', False)],
)
def test_cuda_is_compared_where_there_is_a_gpu(marker: str, holds: bool) -> None:
    assert resolved(f"a ; {marker}", facts=ON_GPU) == (("a",) if holds else ())


@pytest.mark.parametrize(("name", "marker"), [("sentence_transformers", "sentence-transformers"), ("vLLM", "vllm")])
def test_names_of_engines_are_compared_as_people_mean_them(name: str, marker: str) -> None:
    assert resolved(f'a ; #engine# == "{marker}"', engine=name) == ("a",)


def test_of_two_wishes_for_one_distribution_the_later_is_taken() -> None:
    assert resolved("Torch_Audio==1", "numpy<2", "torch-audio==2", "numpy[x]") == ("torch-audio==2", "numpy[x]")
    assert resolved("a==1", "/wheels/a-2-py3-none-any.whl") == ("/wheels/a-2-py3-none-any.whl",)


def test_the_systems_version_may_be_the_one_that_the_engine_pins() -> None:
    assert resolved("#system_torch#", facts=ON_GPU) == ("torch==2.13.0",)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("--index-url=https://x.example", "is no package. Options of pip have fields of their own"),
        ("-r /etc/passwd", "is no package"),
        ("", "is no package"),
        ("a\n--pre", "is no package"),
        ("#system_nothing#", "asks for the nothing of the gateway's Python, which has none"),
        ("#whatever#", "is not understood: there are #system_NAME#"),
        ("a b c", "'a b c' is no requirement"),
        ('a ; colour == "red"', "The marker of 'a ; colour == \"red\"' is not understood"),
        ("a ; ", None),
    ],
)
def test_a_wrong_entry_is_refused_by_name(entry: str, words: str | None) -> None:
    if words is None:
        assert resolved(entry) == ("a",)
        return
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (whose text is the result)
        resolved(entry)
    assert words in str(caught.value)


def test_the_engines_that_packages_are_for_are_known_by_markers_and_dependencies() -> None:
    entries = ['a ; #engine# == "vLLM"', "#sentence_transformers_dependencies#", 'b ; #engine# != "mlx"', "c"]
    assert engines_named(entries) == {"vllm", "sentence-transformers"}


@pytest.mark.parametrize(
    ("requirement", "is_so"),
    [("numpy", True), ("numpy>=2", True), ("numpy<2", False), ("torch==2.13.0", True), ("other", False),
     ("numpy @ https://x.example/n.whl", False), ("/wheels/numpy-1-py3-none-any.whl", False)],
)  # fmt: skip
def test_what_is_installed_satisfies(requirement: str, is_so: bool) -> None:
    assert is_satisfied(requirement, FACTS.installed) is is_so
