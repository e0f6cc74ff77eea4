"""hostler scale"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, tell, with_client
from gateway.client import Client


@click.command("scale")
@click.argument("uid")
@click.argument("n", type=click.IntRange(min=1))
@as_json_option
@with_client
def command(client: Client, uid: str, n: int, as_json: bool) -> None:
    """Have N copies of a launched model from now on, over restarts too.

    Copies that go end after their requests in flight. `hostler terminate` ends them all.
    """
    ids = sorted(one["replica_id"] for one in client.replicas_of(uid))
    if n > len(ids):
        ids = sorted(ids + [one["replica_id"] for one in client.add_replicas(uid, n - len(ids))])
    while len(ids) > n:
        client.remove_replica(uid, ids.pop())
    names = ", ".join(f"{uid}-rep{index}" for index in ids)
    tell(
        f"{uid} has {n} {'copy' if n == 1 else 'copies'}: {names}.",
        {"model_uid": uid, "replica": n, "replica_ids": ids},
        as_json,
    )
