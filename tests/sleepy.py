"""An engine whose server is the fake one and sleeps as vLLM does, with the calls that vLLM's engine makes."""

from __future__ import annotations

import os
from pathlib import Path

from harness import FAKE_ENGINE

from engines.base import Call, Command, Endpoint, Engine, Launch, Needs, Placement, Tier
from engines.vllm import sleep_levels
from registry.resolve import Artifact

RESIDUAL_BYTES = 50_000_000


class Sleepy(Engine, frozen=True, kw_only=True):
    """Loads whatever it gets, onto the CPU."""

    name = "sleepy"
    model_types = ("LLM",)
    asks_for_usage = True
    takes_flags = True
    is_asleep = Call(method="GET", path="/is_sleeping", limit_s=5.0)
    disturbed_sleep = "Memory usage increased after sleeping"
    context_from = ("/v1/models", ("data", 0, "max_model_len"))

    def installed(self) -> str | None:
        """It is here."""
        return None

    def accepts(self, artifact: Artifact) -> str | None:
        """It does."""
        return None

    def needs(self, launch: Launch) -> Needs:
        """What the launch says."""
        return Needs(n_gpu=0)

    def tiers(self, launch: Launch, placement: Placement, needs: Needs) -> tuple[Tier, ...]:
        """As vLLM's."""
        if self.why_sleepless(launch):
            return ()
        return sleep_levels(launch, needs.weight_bytes, RESIDUAL_BYTES, reloads=True)

    def why_sleepless(self, launch: Launch) -> str | None:
        """Whatever is forced."""
        return f"its forced options say {', '.join(launch.forced_options)}" if launch.forced_options else None

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The fake engine, which listens where llama-server would."""
        assert endpoint.socket
        return Command(
            argv=(str(FAKE_ENGINE), "--model", str(model_path), "--host", endpoint.socket, "--alias", launch.uid),
            env={"LLAMA_API_KEY": endpoint.api_key} | launch.envs,
        )


ENGINE = Sleepy()


def installed_in(folder: Path) -> dict[str, str]:
    """The environment of a gateway that knows the engine, by a distribution made in the folder."""
    info = folder / "sleepy-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sleepy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hostler.engines]\nsleepy = sleepy:ENGINE\n")
    here = Path(__file__).parent
    paths = [str(folder), str(here.parent), str(here)]  # ours first: there is a folder `engines` among the tests, too
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join(paths)}
