"""How a model is run: the tuple of all engines, and how to find one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from engines.base import Engine, EngineSettings
from engines.command import ServerCommand
from engines.diffusers import Diffusers
from engines.flexible import Flexible
from engines.llama_cpp import LlamaCpp
from engines.remote import Remote
from engines.requirements import same_name
from engines.sentence_transformers import SentenceTransformers
from engines.sglang import Sglang
from engines.speech_packages import F5TTS, ChatTTS, KokoroTorch, TransformersTTS
from engines.transformers import Transformers
from engines.tts import Kokoro, Piper
from engines.vllm import Vllm
from engines.whisper import FasterWhisper, TransformersASR
from registry.decode import did_you_mean

ENGINES: tuple[Engine, ...] = (
    LlamaCpp(),
    SentenceTransformers(),
    Vllm(),
    Sglang(),
    Transformers(),
    Diffusers(),
    FasterWhisper(),
    TransformersTTS(),
    TransformersASR(),
    Piper(),
    Kokoro(),
    KokoroTorch(),
    ChatTTS(),
    F5TTS(),
    Flexible(),
    ServerCommand(),
    Remote(),
)

logger = logging.getLogger("hostler.engines")


def available(
    settings: Mapping[str, EngineSettings] | None = None, environments: Path | None = None
) -> tuple[Engine, ...]:
    """All engines, ours first, then those of entry points `hostler.engines`, with a site's settings.

    Args:
        environments: the folder of the environments that were installed for engines.
    Raises:
        ValueError: the settings name an engine that there is not.
    """
    engines = {engine.name: engine for engine in ENGINES}
    for entry in entry_points(group="hostler.engines"):
        try:
            engine = entry.load()
            if not isinstance(engine, Engine):
                raise TypeError(f"{engine!r} is no engines.base.Engine")
        except Exception:  # a stranger's package must not keep the others from starting
            logger.exception("The engine %s (%s) cannot be loaded and is left out.", entry.name, entry.value)
            continue
        engines.setdefault(engine.name, engine)
    of_site = {}
    for name, of_engine in (settings or {}).items():
        known = next((one for one in engines if same_name(name) == same_name(one)), None)
        if known is None:
            raise ValueError(f"There is no engine {name!r}. {did_you_mean(name, engines)}")
        of_site[known] = of_engine
    nothing = EngineSettings()
    return tuple(engine.configured(of_site.get(engine.name, nothing), environments) for engine in engines.values())


def find(name: str, engines: tuple[Engine, ...] = ENGINES, model_type: str | None = None) -> Engine:
    """The engine of that name, case aside, with `-` for `_` and `.`: Xinference spells some so.

    Args:
        model_type: where one name stands for several engines, the one that serves this type is meant; else the one
            that is called so itself.
    Raises:
        ValueError: there is none; the text says which there are.
    """
    named = [one for one in engines if same_name(name) in map(same_name, (one.name, *one.aliases))]
    if named:
        named.sort(key=lambda one: same_name(one.name) != same_name(name))
        return next((one for one in named if model_type in one.model_types), named[0])
    raise ValueError(f"There is no engine {name!r}. {did_you_mean(name, [e.name for e in engines])}")
