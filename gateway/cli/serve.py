"""hostler serve"""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gateway.deployment import Deployment
    from gateway.fleet import Fleet

PROGRESS_PAUSE_S = 2.0


@click.command("serve")
@click.option("-c", "--config", "file", type=click.Path(), help="Settings: a .yaml, .toml or .json file.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0: any free one.  [default: 9997]")
@click.option("--home", type=click.Path(), help="Folder of launches, logs and fetched files.  [default: ~/.hostler]")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--insecure", is_flag=True, help="Listen beyond loopback without an API key.")
@click.option("--prompt", metavar="TEXT", help="Once a model is ready, have it complete this text, and show how.")
def command(file: str | None, insecure: bool, prompt: str | None, **flags: Any) -> None:
    """Serve models until Ctrl-C, which ends at once; SIGTERM lets requests in flight end first."""
    from gateway import server
    from gateway.config import Source
    from gateway.errors import SettingsError
    from gateway.handover import HandoverFailed, predecessor

    before = predecessor()

    async def greet(fleet: Fleet, address: str) -> None:
        await _greet(fleet, address, prompt)

    try:
        source = Source.of(file, flags, insecure=insecure)
        settings = source.read()
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
        )
        server.run(settings, greet if before is None else None, before, source)
    except (SettingsError, HandoverFailed) as exc:
        click.echo(f"hostler: {exc}", err=True)
        if before and isinstance(exc, SettingsError):
            before.failed(str(exc))
        sys.exit(2)


async def _greet(fleet: Fleet, address: str, prompt: str | None) -> None:
    """Say where the door is, how far the models are, and how to ask one."""
    from gateway.replica import State

    click.echo(f"Hostler is at {address}")
    preloaded = [deployment for deployment in fleet.deployments() if deployment.launch.preload]
    for deployment in preloaded:
        await _until_loaded(deployment)
    ready = [deployment for deployment in preloaded if deployment.state is State.READY]
    if not ready:
        return
    launch, keys = ready[0].launch, fleet.settings.api_keys
    example = {"model": launch.uid, "prompt": prompt or "The capital of France is", "max_tokens": 24}
    header = ' \\\n    -H "Authorization: Bearer $HOSTLER_API_KEY"' if keys else ""
    click.echo(
        f"Ask it:\n  curl {address}/v1/completions -H 'Content-Type: application/json'{header} \\\n"
        f"    -d {shlex.quote(json.dumps(example))}"
    )
    if prompt:
        from gateway.client import Client

        client = Client(address, keys[0] if keys else None)
        answer = await asyncio.to_thread(client.post, "/v1/completions", example | {"temperature": 0})
        click.echo(f"{launch.uid} answers:\n  {prompt}{answer['choices'][0]['text']}")


async def _until_loaded(deployment: Deployment) -> None:
    """Wait until the model is ready or has failed; say how far it is meanwhile."""
    clock = asyncio.get_running_loop().time
    told_at = clock()
    while not (deployment.is_settled or deployment.has_failed):
        if (rest_s := told_at + PROGRESS_PAUSE_S - clock()) > 0:
            await deployment.changed(limit_s=rest_s)
            continue
        click.echo(deployment.progress_text())
        told_at = clock()
    click.echo(deployment.failure_text() if deployment.has_failed else f"{deployment.launch.uid} is {deployment.state}")
