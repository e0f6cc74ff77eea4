"""The gateway on real cards: each part tells one thing, is bounded in time, and leaves its figures as it goes.

    python bench/gpu/run.py one-card                     # placement, our workers, kill -9
    python bench/gpu/run.py vllm                         # vLLM: start, latency, kill -9, sleep
    python bench/gpu/run.py many-models                  # vLLM: swaps of models that do not fit together, a trace
    python bench/gpu/run.py two-cards                    # copies and tensor parallelism
    python bench/gpu/run.py start latency --seconds 240  # parts by name

Needs a Python that has what the gateway needs, and torch or vLLM for the parts that say so. Writes NAME.json, and the
logs beside it, into --out (bench/results); models are made in, or looked for in, --models.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "gateway/sdk")]

import killing  # noqa: E402
import libraries  # noqa: E402
import placing  # noqa: E402
import swapping  # noqa: E402
import tokens  # noqa: E402
from batch import Bench  # noqa: E402
from notes import Notes  # noqa: E402

SHARED = ("m1b", "big-a", "big-b", "small-a", "small-b")  # models that several parts use
END_S = 15.0  # for the end of all, and the logs
NEEDED = (
    "aiohttp",
    "click",
    "httptools",
    "msgspec",
    "numpy",
    "psutil",
    "pynvml",
    "starlette",
    "uvicorn",
    "uvloop",
    "yaml",
)


@dataclass(frozen=True)
class Part:
    """`needs_s`: with less time it is left out; `limit_s`: then it is given up."""

    run: Callable[[Bench], Awaitable[None]]
    needs_s: float
    limit_s: float
    packages: tuple[str, ...] = ()


PARTS: dict[str, Part] = {
    "facts": Part(placing.facts, 10, 100, ("pytest", "pytest_asyncio")),
    "placement": Part(placing.placement, 40, 180, ("torch", "transformers")),
    "embeddings": Part(libraries.embeddings, 30, 180, ("torch", "sentence_transformers")),
    "transformers": Part(libraries.transformers, 30, 80, ("torch", "transformers")),
    "diffusers": Part(libraries.diffusers, 25, 150, ("torch", "diffusers")),
    "kill-worker": Part(killing.worker, 40, 100, ("torch", "transformers")),
    "start": Part(tokens.start, 60, 200, ("vllm",)),
    "latency": Part(tokens.latency, 30, 230, ("vllm",)),
    "kill-vllm": Part(killing.vllm, 60, 150, ("vllm",)),
    "kill-group": Part(killing.vllm_group, 10, 150, ("vllm",)),
    "sleep-1b": Part(swapping.small, 15, 40, ("vllm",)),
    "tiers": Part(swapping.tiers, 10, 60, ("vllm",)),
    "large": Part(swapping.large, 70, 200, ("vllm",)),
    "crowd": Part(swapping.crowd, 100, 300, ("vllm",)),
    "swaps": Part(swapping.swaps, 40, 110, ("vllm",)),
    "trace": Part(swapping.trace, 45, 200, ("vllm",)),
    "places": Part(placing.several_cards, 40, 130, ("torch", "transformers")),
    "copies": Part(swapping.copies, 50, 140, ("vllm",)),
    "parallel": Part(swapping.parallel, 60, 180, ("vllm",)),
}
RUNS: dict[str, tuple[str, ...]] = {
    "one-card": ("facts", "placement", "kill-worker", "embeddings", "transformers", "diffusers"),
    "vllm": ("start", "latency", "kill-vllm", "sleep-1b", "tiers"),
    "many-models": ("crowd", "swaps", "trace"),
    "two-cards": ("facts", "places", "copies", "parallel"),
}


def main() -> int:
    """Run them; 1 if one of them broke."""
    options = parse()
    names = [part for name in options.parts for part in RUNS.get(name, (name,))]
    notes = Notes(options.out, options.name or "-".join(options.parts), options.seconds - END_S)
    notes.found["command"] = " ".join(["python bench/gpu/run.py", *sys.argv[1:]])
    lacking = check(notes, names)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="hg-") as work:
        bench = Bench(notes, Path(work), options.models, options.cpu, {})
        return asyncio.run(run(bench, names, lacking, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*RUNS, *PARTS], metavar="PART", help=", ".join([*RUNS, *PARTS]))
    parser.add_argument("--seconds", type=float, default=560.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--name", help="of the files written; else the parts'")
    parser.add_argument(
        "--models", type=Path, default=Path("/tmp/hostler-models"), help="`tok` is a tokenizer's folder"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="ask for no GPU where it can be left out: a check of the bench"
    )
    return parser.parse_args()


def check(notes: Notes, names: list[str]) -> dict[str, list[str]]:
    """What the machine is and has; the packages that each part lacks."""
    import card

    cards = [gpu.name for gpu in card.gpus()]
    notes.found["machine"] = {
        "cards": cards,
        "host": platform.node(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": {
            name: version(name) for name in ("torch", "vllm", "transformers", "sentence-transformers", "diffusers")
        },
    }
    notes.say("machine:", notes.found["machine"])
    lacking = {name: [one for one in PARTS[name].packages if importlib.util.find_spec(one) is None] for name in names}
    missing = [one for one in NEEDED if importlib.util.find_spec(one) is None]
    notes.say("packages of the gateway and the bench that are missing:", ", ".join(missing) or "none")
    if missing:
        raise SystemExit(f"run: install {', '.join(missing)} first")
    if not cards:
        notes.say("there is no GPU here: what needs one will say so")
    return lacking


def version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        return of(name)
    except PackageNotFoundError:
        return None


async def run(bench: Bench, names: list[str], lacking: dict[str, list[str]], options: argparse.Namespace) -> int:
    notes, broken = bench.notes, []
    try:
        for name in names:
            part = PARTS[name]
            notes.begin(name)
            if lacking[name]:
                notes.told("left out", f"this Python has no {', '.join(lacking[name])}")
            elif notes.left_s < part.needs_s:
                notes.told("left out", f"{notes.left_s:.0f} s are left, it needs {part.needs_s:.0f}")
            else:
                try:
                    async with asyncio.timeout(min(part.limit_s, notes.left_s)):
                        await part.run(bench)
                    notes.keep("done", True)
                except Exception as exc:
                    broken.append(name)
                    notes.told("broke", f"{type(exc).__name__}: {str(exc)[:1500]}")
                    notes.keep("trace back", traceback.format_exc()[-3000:])
                    with contextlib.suppress(Exception):
                        await bench.clear(*SHARED)
    finally:
        await bench.end()
        notes.say(f"broke: {', '.join(broken) or 'nothing'}; the figures are in {notes.file}")
        notes.write()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
