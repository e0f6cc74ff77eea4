"""hostler embedding"""

from __future__ import annotations

import click

from gateway.cli.options import as_json_option, model_uid_option, print_json, print_table, with_client
from gateway.client import Client

SHOWN = 4  # numbers of a vector


@click.command("embedding")
@click.argument("words", nargs=-1, required=True, metavar="UID TEXT...")
@model_uid_option
@as_json_option
@with_client
def command(client: Client, words: tuple[str, ...], model_uid: str | None, as_json: bool) -> None:
    """Turn texts into vectors. With --model-uid all words are texts."""
    model, *texts = (model_uid, *words) if model_uid else words
    if not texts:
        raise click.UsageError("Missing the text.")
    answer = client.embed(model, texts)
    if as_json:
        print_json(answer)
        return
    print_table(
        {"TEXT": "left", "DIMENSIONS": "right", "VECTOR": "left"},
        [[texts[item["index"]], str(len(item["embedding"])), _begin(item["embedding"])] for item in answer["data"]],
    )


def _begin(vector: list[float]) -> str:
    return " ".join(f"{number:.4f}" for number in vector[:SHOWN]) + (" ..." if vector[SHOWN:] else "")
