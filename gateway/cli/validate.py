"""hostler validate"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.cli.options import as_json_option, print_json
from gateway.cli.register import read

if TYPE_CHECKING:
    from engines.base import Engine
    from gateway.launch import Site
    from registry.inspection import Inspection
    from registry.registry import Registry


@click.command("validate")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "-t", "--model-type", help="LLM, embedding, rerank, image, audio, flexible; told from the file if it can be."
)
@click.option("-c", "--config", "file", type=click.Path(), help="A settings file, for its engines and catalogues.")
@as_json_option
def command(path: Path, model_type: str | None, file: str | None, as_json: bool) -> None:
    """Say what is wrong with a model's JSON, what is defaulted, what its files say, and which engines could run it.

    Asks no gateway, and registers nothing. Files that it names are looked for on this machine.
    """
    from gateway.config import load
    from gateway.errors import SettingsError
    from gateway.fleet import available_engines, open_registry, site_of
    from registry.inspection import inspect

    try:
        settings = load(file, {})
        registry, engines = open_registry(settings), available_engines(settings)
    except SettingsError as exc:
        raise click.ClickException(str(exc)) from exc
    text = read(path)
    chosen, note = (model_type, None) if model_type else _guessed(text)
    inspection = inspect(registry, _known(chosen), text)
    answers = _answers(inspection, registry, engines, site_of(settings))
    if as_json:
        print_json(_plain(inspection, answers))
    else:
        _show(path, inspection, answers, note)
    sys.exit(1 if inspection.errors else 0)


def _guessed(text: str) -> tuple[str, str]:
    """The type that the file is of by its looks, and a word on that."""
    from registry.decode import DecodeError
    from registry.inspection import guess_types
    from registry.registry import object_of

    try:
        found = guess_types(object_of(text))
    except DecodeError as exc:
        raise click.ClickException(f"The model's JSON is wrong: {exc}") from exc
    if len(found) != 1:
        raise click.ClickException(f"It could be a model of type {' or '.join(found)}: say which with -t.")
    return found[0], "as told from its keys"


def _known(model_type: str) -> str:
    """The type in its own spelling."""
    from registry.decode import did_you_mean
    from registry.registry import REGISTRABLE

    found = next((one for one in REGISTRABLE if one.casefold() == model_type.casefold()), None)
    if found is None:
        hint = did_you_mean(model_type, REGISTRABLE, what="Model types")
        raise click.ClickException(f"No model can be registered as {model_type!r}. {hint}")
    return found


def _answers(inspection: Inspection, registry: Registry, engines: Sequence[Engine], site: Site) -> dict[str, list[str]]:
    """For each engine and each spec: could run it, or why not."""
    from gateway.choice import engine_answers
    from gateway.launch import LaunchRequest, plan

    family = inspection.family
    if family is None:
        return {}
    including = registry.including(family)
    found: dict[str, list[str]] = {engine.name: [] for engine in engines}
    for spec in family.specs:
        wish = LaunchRequest(
            model_name=family.model_name,
            model_type=inspection.model_type,
            model_format=spec.model_format,
            model_size_in_billions=spec.model_size_in_billions,
            quantization=spec.quantization,
        )
        for name, reason in engine_answers(
            engines, wish, lambda one: plan("a", one, including, engines, site=site)
        ).items():
            what = f"{spec.model_format} {spec.quantization}"
            found[name].append(f"cannot run {what}: {reason}" if reason else f"could run {what}")
    return {name: list(dict.fromkeys(said)) for name, said in found.items()}


# --- how it is told


def _plain(inspection: Inspection, answers: dict[str, list[str]]) -> dict[str, Any]:
    import msgspec

    from registry.schema import encode_family

    told: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(inspection, family=None))
    told["family"] = encode_family(inspection.family) if inspection.family else None
    return told | {"can_be_registered": not inspection.errors, "engines": answers}


def _show(path: Path, inspection: Inspection, answers: dict[str, list[str]], note: str | None) -> None:
    kind = inspection.model_type + (f", {note}" if note else "")
    click.secho(f"{inspection.model_name or path} ({kind})", bold=True)
    _list("Wrong", inspection.errors)
    _list("Read otherwise than written, or of doubtful use", inspection.notes)
    _list("Defaulted", [f"{key}: {_short(value)}" for key, value in inspection.defaulted.items()])
    _list("Inherited", inspection.inherited)
    for spec in inspection.specs:
        where = f" at {spec.path}" if spec.path else f" at {spec.source}: not on this machine, so not looked into"
        told = [*spec.notes, *(f"contradiction: {one}" for one in spec.contradictions), *spec.inferred]
        _list(f"{spec.place}, {spec.model_format} {spec.quantization}{where}", told, should_show_empty=True)
    _list("Engines", [f"{name} {one}" for name, said in answers.items() for one in said])
    verdict = f"{path} cannot be registered." if inspection.errors else f"{path} can be registered."
    click.echo(verdict)


def _list(title: str, lines: Iterable[str], *, should_show_empty: bool = False) -> None:
    lines = list(lines)
    if lines or should_show_empty:
        click.secho(title, bold=True)
        for line in lines:
            click.echo(f"  {line}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
