"""hostler rerank"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, model_uid_option, print_json, print_table, with_client
from gateway.client import Client


@click.command("rerank")
@click.argument("words", nargs=-1, required=True, metavar="UID QUERY DOCUMENT...")
@model_uid_option
@click.option("--top-n", type=click.IntRange(1), help="Only so many, the best.")
@as_json_option
@with_client
def command(client: Client, words: tuple[str, ...], model_uid: str | None, top_n: int | None, as_json: bool) -> None:
    """Order documents by how well they answer a query, the best first. With --model-uid the query comes first."""
    model, *texts = (model_uid, *words) if model_uid else words
    if len(texts) < 2:
        raise click.UsageError("Give a query and at least one document.")
    query, *documents = texts
    answer = client.rerank(model, query, documents, top_n=top_n)
    if as_json:
        print_json(answer)
        return
    print_table(
        {"SCORE": "right", "INDEX": "right", "DOCUMENT": "left"},
        [[f"{one['relevance_score']:.4f}", str(one["index"]), documents[one["index"]]] for one in answer["results"]],
    )
