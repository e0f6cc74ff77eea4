"""hostler launch"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from gateway.calls import PROGRESS_PAUSE_S
from gateway.cli.options import print_json, with_client
from gateway.client import Client, ClientError, Step

MODEL_PATHS = ("--model-path", "--model_path")


class LaunchCommand(click.Command):
    """Takes `--key value` pairs beyond its options, which are those of the engine."""

    takes_name = False  # whether one word may stand for --model-name

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split the pairs off before the rest is read as usual."""
        if set(MODEL_PATHS) <= {word.partition("=")[0] for word in args}:
            raise click.UsageError("Cannot set both for --model-path and --model_path", ctx)
        own, ctx.meta["extras"] = _split(args, self._words(), takes_name=self.takes_name)
        return super().parse_args(ctx, own)

    def _words(self) -> dict[str, int]:
        """How many words follow each option of ours."""
        ours = [one for one in self.params if isinstance(one, click.Option)]
        found = {name: 0 if one.is_flag else one.nargs for one in ours for name in (*one.opts, *one.secondary_opts)}
        return found | {"-h": 0, "--help": 0}


@click.command("launch", cls=LaunchCommand, options_metavar="[OPTIONS] [--KEY VALUE]...")
@click.option("-n", "--model-name", help="A family of the catalogue, or one of your own.")
@click.option("-t", "--model-type", default="LLM", show_default=True, help="LLM, embedding, rerank, image, ...")
@click.option("-en", "--model-engine", help="The engine; the best that is here if not given.")
@click.option("-u", "--model-uid", help="How clients name it; else the family's name.")
@click.option("-s", "--size-in-billions", "model_size_in_billions", help="Such as 7, 0.5 or 0_5.")
@click.option("-f", "--model-format", help="pytorch, ggufv2, gptq, awq, ...")
@click.option("-q", "--quantization", help="Such as none, Int4, Q4_K_M.")
@click.option("-r", "--replica", type=int, help="Copies to run.  [default: 1]")
@click.option("--replica-config", metavar="JSON", help="A list, one item for each copy.")
@click.option("--n-worker", type=int, help="Machines for one copy.")
@click.option("--n-gpu", help="auto, how many GPUs for a copy, or none: the CPU.")
@click.option("--gpu-idx", metavar="N,N", help="These GPUs and no others.")
@click.option("--worker-ip", help="The machine to run on.")
@click.option("-lm", "--lora-modules", nargs=2, multiple=True, metavar="NAME PATH", help="An adapter; may be repeated.")
@click.option("-ld", "--image-lora-load-kwargs", nargs=2, multiple=True, metavar="KEY VALUE")
@click.option("-fd", "--image-lora-fuse-kwargs", nargs=2, multiple=True, metavar="KEY VALUE")
@click.option("-qc", "--quantization-config", nargs=2, multiple=True, metavar="KEY VALUE", help="How to quantize.")
@click.option("--trust-remote-code", type=bool, help="Run code that comes with the model.")
@click.option("-mp", "--model-path", metavar="PATH", help="Files on the gateway's machine, in place of a download.")
@click.option("--enable-thinking", is_flag=True, default=None, help="Have it think before it answers.")
@click.option(
    "--enable-virtual-env/--disable-virtual-env",
    "enable_virtual_env",
    default=None,
    help="Run it in a Python environment of its own.",
)
@click.option(
    "-vp",
    "--virtual-env-package",
    "virtual_env_packages",
    multiple=True,
    metavar="REQUIREMENT",
    help="A package for that environment; may be repeated.",
)
@click.option(
    "--virtual-env-find-link",
    "virtual_env_find_links",
    multiple=True,
    metavar="FOLDER",
    help="Where such packages are; may be repeated.",
)
@click.option(
    "-ev", "--env", "envs", nargs=2, multiple=True, metavar="NAME VALUE", help="Environment of the engine's process."
)
@click.option("--context-length", type=int, help="Tokens of prompt and answer.")
@click.option("--force-options", is_flag=True, default=None, help="Pass on pairs that are not known here, unchecked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_client
def command(client: Client, as_json: bool, **options: Any) -> None:
    """Serve a model from now on, over restarts too, and show how far it is until it is ready.

    Further pairs of --KEY VALUE go to the engine, by its own names. Ctrl-C asks whether to cancel the launch.
    """
    wish = wish_of(options) | click.get_current_context().meta["extras"]
    if not wish.get("model_name") and not wish.get("model_path"):
        raise click.UsageError("Missing option '-n' / '--model-name'; `hostler registrations` shows the names.")
    uid = client.launch(wait=False, **wish)
    try:
        _follow(client, uid)
    except KeyboardInterrupt:
        _ask_to_cancel(client, uid)
    if options["force_options"] and (forced := client.get_model(uid).get("forced_options")):
        click.echo(f"Passed on to the engine unchecked: {', '.join(forced)}.", err=True)
    click.echo(f"Model uid: {uid}", err=True)
    if as_json:
        print_json({"model_uid": uid})


# --- what is asked for


def _split(args: list[str], words: dict[str, int], *, takes_name: bool = False) -> tuple[list[str], dict[str, Any]]:
    """Our options, and the pairs that are none of ours."""
    own: list[str] = []
    extras: dict[str, Any] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if takes_name and not word.startswith("-"):
            own += ["--model-name", word]
            takes_name = False
            continue
        if not word.startswith("-"):
            raise click.UsageError(
                "You must specify extra kwargs with `--` prefix. "
                f"There is an error in parameter passing that is {word}."
            )
        if name in words or not name.startswith("--"):
            n_words = 0 if equals else words.get(name, 0)
            own += [word, *rest[:n_words]]
            del rest[:n_words]
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        extras[name[2:].replace("-", "_")] = typed(value)
    return own, extras


def typed(text: str) -> Any:
    """None, true, false, a number, a JSON object or array, or else the text itself."""
    if text in ("None", "none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def wish_of(options: dict[str, Any]) -> dict[str, Any]:
    """The launch as it is sent: what was not given is not there."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    adapters = _adapters(given)
    for name in ("quantization_config", "envs"):
        if pairs := given.get(name):
            given[name] = {key: value if name == "envs" else typed(value) for key, value in pairs}
    for name in ("virtual_env_packages", "virtual_env_find_links"):
        if name in given:
            given[name] = list(given[name])
    if "gpu_idx" in given:
        given["gpu_idx"] = _gpus(given["gpu_idx"])
    if "n_gpu" in given:
        given["n_gpu"] = _n_gpu(given["n_gpu"])
    if "replica_config" in given:
        given["replica_config"] = _json(given["replica_config"], "--replica-config")
    return given | ({"peft_model_config": adapters} if adapters else {})


def _adapters(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if modules := given.pop("lora_modules", ()):
        found["lora_list"] = [{"lora_name": name, "local_path": path} for name, path in modules]
    for name in ("image_lora_load_kwargs", "image_lora_fuse_kwargs"):
        if pairs := given.pop(name, ()):
            found[name] = {key: typed(value) for key, value in pairs}
    return found


def _gpus(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise click.BadParameter(f"{text!r} is no list of GPUs such as 0,1.", param_hint="--gpu-idx") from exc


def _n_gpu(text: str) -> Any:
    if text.lower() in ("none", "auto"):
        return None if text.lower() == "none" else "auto"
    if not text.isdecimal():
        raise click.BadParameter(f"{text!r} is neither a number nor auto nor none.", param_hint="--n-gpu")
    return int(text)


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise click.BadParameter(f"This is no JSON: {exc}.", param_hint=option) from exc


# --- how far it is


def _follow(client: Client, uid: str) -> None:
    """Show how far the launch is, until it is ready."""
    steps = _telling_failures(client.launch_progress(uid, PROGRESS_PAUSE_S))
    if sys.stderr.isatty():
        _draw(client, uid, steps)
        return
    told = None
    for step in steps:
        if step.stage != told:
            click.echo(f"{uid}: {step.stage}", err=True)
        told = step.stage


def _telling_failures(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps; a copy that failed and is tried again is told of meanwhile."""
    told = set()
    for step in steps:
        for replica in step.replicas:
            reason = replica.get("error_message")
            if reason and reason not in told:
                click.echo(reason, err=True)
                told.add(reason)
        yield step


def _draw(client: Client, uid: str, steps: Iterator[Step]) -> None:
    """A bar, and beside it what the replicas say of themselves: bytes, rate, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.fields[stage]}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(uid, total=1.0, stage="pending", detail="")
        for step in steps:
            bars.update(bar, completed=step.progress, stage=step.stage, detail=_detail(client, uid))


def _detail(client: Client, uid: str) -> str:
    try:
        found = client.replicas()
    except ClientError:
        return ""
    return next((one["progress"] for one in found if one["uid"] == uid and one["progress"]), "")


def _ask_to_cancel(client: Client, uid: str) -> None:
    """After Ctrl-C. Does not return."""
    try:
        should_cancel = click.confirm(f"\nCancel the launch of {uid}?", default=False, err=True)
    except click.Abort:  # nobody answers
        should_cancel = False
    if should_cancel:
        client.cancel(uid)
        click.echo(f"The launch of {uid} is cancelled.", err=True)
    else:
        click.echo(f"{uid} goes on loading; `hostler ps` shows how far it is.", err=True)
    sys.exit(130)
