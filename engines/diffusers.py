"""diffusers: models that make and change pictures and films, by our workers over its pipelines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engines.base import (
    TORCH_BYTES,
    Adapter,
    Command,
    Endpoint,
    Engine,
    Launch,
    Placement,
    with_safer_options,
    worker_command,
)
from engines.environments import find_python, why_no_python
from registry.additions import Role
from registry.resolve import Artifact

MODULES = ("diffusers", "torch", "transformers")
FORMATS = ("pytorch", "diffusers")
MOST_PIXELS = 2048 * 2048
OF_GPU = re.compile(r"(CUDA|HIP|MPS)\b.*out of memory")


class DiffusersOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to diffusers."""

    device: Annotated[str, Meta(description="cuda, cuda:1, mps, cpu; chosen if not given")] | None = None
    torch_dtype: (
        Annotated[
            Literal["auto", "float32", "float16", "bfloat16"],
            Meta(description="of the weights; auto: what the device is best at"),
        ]
        | None
    ) = None
    dtype: (
        Annotated[Literal["auto", "float32", "float16", "bfloat16"], Meta(description="the same as torch_dtype")] | None
    ) = None
    variant: Annotated[str, Meta(description="of the files, such as fp16")] | None = None
    cpu_offload: Annotated[bool, Meta(description="keep on the GPU only the part that computes")] = False
    sequential_cpu_offload: Annotated[bool, Meta(description="layer by layer: least memory, slow")] = False
    vae_tiling: Annotated[bool, Meta(description="decode large pictures in tiles")] = False
    vae_slicing: Annotated[bool, Meta(description="decode pictures one by one")] = False
    attention_slicing: bool = False
    scheduler: Annotated[str, Meta(description="sampler, such as `DPM++ 2M Karras`, or a scheduler's class")] | None = (
        None
    )
    default_generate_config: Annotated[dict[str, Any], Meta(description="what requests get that do not say it")] = {}
    lora_list: Annotated[tuple[Adapter, ...], Meta(description="LoRAs to load and fuse, as folders or files")] = ()
    image_lora_load_kwargs: Annotated[dict[str, Any], Meta(description="of diffusers, to load them")] | None = None
    image_lora_fuse_kwargs: Annotated[dict[str, Any], Meta(description="of diffusers, to fuse them")] | None = None
    max_pixels: Annotated[int, Meta(ge=64, description="width times height that requests may ask for")] = MOST_PIXELS
    n_threads: Annotated[int, Meta(ge=1, description="of the CPU")] | None = None

    def __post_init__(self) -> None:
        if self.cpu_offload and self.sequential_cpu_offload:
            raise ValueError("cpu_offload and sequential_cpu_offload exclude each other")


class Diffusers(Engine, frozen=True, kw_only=True):
    """Folders with a model_index.json; and, by transformers, models that read pictures."""

    name = "diffusers"
    model_types = ("image", "video")
    overhead_bytes = TORCH_BYTES
    additions = ("gguf", "lightning", "controlnet")
    options = DiffusersOptions
    less_memory = "Say vae_tiling and cpu_offload (or sequential_cpu_offload), or lower max_pixels."

    def safer(self, launch: Launch, said: Sequence[str]) -> tuple[Launch, str] | None:
        """Pictures decoded in tiles; on a GPU, only the part there that computes."""
        options: DiffusersOptions = self.read_options(_of_family(launch) | launch.options)
        safer: dict[str, tuple[Any, str]] = {}
        if not options.vae_tiling:
            safer["vae_tiling"] = (True, "pictures decoded in tiles")
        if not options.attention_slicing:
            safer["attention_slicing"] = (True, "attention in slices")
        on_cpu = launch.n_gpu == 0 or options.device == "cpu"
        if not (options.cpu_offload or options.sequential_cpu_offload or on_cpu) and OF_GPU.search("\n".join(said)):
            safer["cpu_offload"] = (True, "what does not compute off the GPU")
        return with_safer_options(launch, safer)

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        if find_python(self.name, MODULES, self.settings, self.environments):
            return None
        return why_no_python(self.name, self.settings)

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads whole pipelines as diffusers saves them."""
        spec = artifact.spec
        if spec.engine and spec.engine.lower() != self.name:
            return f"these files are for {spec.engine}"
        if spec.model_format not in FORMATS:
            return f"diffusers loads folders of pipelines (model_format pytorch), not {spec.model_format}"
        return None

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """A worker of ours; which one, the type of the model says."""
        options: DiffusersOptions = self.read_options(_of_family(launch) | launch.options)
        python = python or find_python(self.name, MODULES, self.settings, self.environments)
        if python is None:
            raise FileNotFoundError(self.installed())
        worker = "video" if launch.artifact.family.model_type == "video" else "image"
        return worker_command(
            worker, python, launch, model_path, placement, endpoint, _worker_options(options, launch, placement)
        )


def _of_family(launch: Launch) -> dict[str, Any]:
    """The options that the family says for every launch of it; it may say things that mean nothing to us."""
    given = getattr(launch.artifact.family, "default_model_config", None) or {}
    return {name: value for name, value in given.items() if name in DiffusersOptions.__struct_fields__}


def _worker_options(options: DiffusersOptions, launch: Launch, placement: Placement) -> Mapping[str, Any]:
    """As the workers read them; what is not set is left out."""
    family = launch.artifact.family
    has_no_gpu = launch.n_gpu == 0 or placement.gpu_uuids == ()
    of_family = getattr(family, "default_generate_config", None) or {}
    values = {
        "model_family": getattr(family, "model_family", None),
        "device": options.device or ("cpu" if has_no_gpu else None),
        "torch_dtype": options.torch_dtype or options.dtype,
        "variant": options.variant,
        "cpu_offload": options.cpu_offload,
        "sequential_cpu_offload": options.sequential_cpu_offload,
        "vae_tiling": options.vae_tiling,
        "vae_slicing": options.vae_slicing,
        "attention_slicing": options.attention_slicing,
        "scheduler": options.scheduler,
        "generate_config": {**of_family, **options.default_generate_config},
        "controlnet": _paths(launch, "controlnet"),
        "lora_list": msgspec.to_builtins(options.lora_list),
        "image_lora_load_kwargs": options.image_lora_load_kwargs,
        "image_lora_fuse_kwargs": options.image_lora_fuse_kwargs,
        "gguf_file": next(iter(_paths(launch, "gguf")), None),
        "lightning_file": next(iter(_paths(launch, "lightning")), None),
        "max_pixels": options.max_pixels,
        "n_threads": options.n_threads,
    }
    return {name: value for name, value in values.items() if value not in (None, False, {}, [], ())}


def _paths(launch: Launch, role: Role) -> list[str]:
    """Where what the launch wishes for beside the model is."""
    return [addition.source.model_id for addition in launch.artifact.additions if addition.role == role]
