"""Pipelines of diffusers: loaded once, lent to each task, run picture by picture with a seed of its own."""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)

from engines.workers import samplers
from engines.workers.device import torch_device
from engines.workers.jobs import Job
from engines.workers.server import Cancelled, Order, Refused, is_out_of_memory
from engines.workers.wishes import Wish

# task -> who derives its pipeline from another, and the pipelines that are for it
TASKS: dict[str, tuple[Any, Any]] = {
    "text2image": (AutoPipelineForText2Image, AUTO_TEXT2IMAGE_PIPELINES_MAPPING),
    "image2image": (AutoPipelineForImage2Image, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
    "inpainting": (AutoPipelineForInpainting, AUTO_INPAINT_PIPELINES_MAPPING),
}
WORDS = {
    "text2image": "make pictures of text alone",
    "image2image": "change pictures",
    "inpainting": "change a part of a picture",
}
# Arguments of pipelines that are ours to set, or that no JSON can hold.
_OURS = """
self prompt negative_prompt image images mask_image mask last_image control_image video height width generator
output_type return_dict callback callback_steps callback_on_step_end callback_on_step_end_tensor_inputs
num_images_per_prompt num_videos_per_prompt args kwargs
"""
OURS = frozenset(_OURS.split())
NO_JSON = ("latents", "embeds", "embeds_mask", "attention_mask", "ip_adapter_image", "ip_adapter_masks")
# Few steps of Qwen's pictures want another schedule: that of its lightning weights' authors.
QWEN_LIGHTNING = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}


class Pipelines:
    """A model's pipelines, one for each task, which share its weights."""

    def __init__(self, order: Order) -> None:
        """Load the model.

        Raises:
            Refused: it cannot be loaded; the text says why.
        """
        self._options = order.options
        self.uid = order.uid
        self._folder = Path(order.model)
        self._device = torch_device(self._options)
        if not self._options.get("device") and torch.backends.mps.is_available():
            self._device = "mps"
        self._dtype = _dtype_of(self._options.get("torch_dtype"), self._device)
        diffusers.utils.logging.disable_progress_bar()  # logs are read by people
        transformers.utils.logging.disable_progress_bar()
        self._base = self._load()
        self._base.set_progress_bar_config(disable=True)
        self._controlnet = self._load_controlnet()
        self._of_task: dict[str, Any] = {}
        self._placed: Any = None
        self._load_adapters()
        self._save_memory(self._base)
        self._place(self._base)
        print(f"{type(self._base).__name__} on {self._device} in {self._dtype}", file=sys.stderr, flush=True)

    # --- loading

    def _load(self) -> Any:
        index = self._folder / "model_index.json"
        if not index.is_file():
            raise Refused(
                f"{self._folder} has no model_index.json: this is no pipeline of diffusers. Name the folder that has "
                "one, or another engine."
            )
        more: dict[str, Any] = {"torch_dtype": self._dtype}
        if variant := self._options.get("variant"):
            more["variant"] = variant
        try:
            if file := self._options.get("gguf_file"):
                more["transformer"] = gguf_transformer(self._folder, Path(file), self._dtype)
            return DiffusionPipeline.from_pretrained(str(self._folder), local_files_only=True, **more)
        except Refused:
            raise
        except Exception as exc:  # of any library that reads a file
            raise Refused(_why_not_loaded(self._folder, exc)) from exc

    def _load_controlnet(self) -> Any:
        models = []
        for path in self._options.get("controlnet") or ():
            if not Path(path).is_dir():
                raise Refused(f"The controlnet {path!r} is no folder. Give the path of one.")
            try:
                name = json.loads((Path(path) / "config.json").read_text())["_class_name"]
                models.append(getattr(diffusers, name).from_pretrained(path, torch_dtype=self._dtype))
            except Exception as exc:  # as above
                raise Refused(f"The controlnet {_why_not_loaded(Path(path), exc)}") from exc
        return models[0] if len(models) == 1 else models or None

    def _load_adapters(self) -> None:
        """LoRA and lightning weights, all at once, fused as the launch says."""
        adapters = [(one["lora_name"], one["local_path"]) for one in self._options.get("lora_list") or ()]
        if file := self._options.get("lightning_file"):
            adapters.append(("lightning", file))
            if type(self._base).__name__.startswith("QwenImage"):
                config = self._base.scheduler.config
                self._base.scheduler = type(self._base.scheduler).from_config(config, **QWEN_LIGHTNING)
        if not adapters:
            return
        if not hasattr(self._base, "load_lora_weights"):
            raise Refused(f"{type(self._base).__name__} takes no LoRA. Launch it without.")
        load_kwargs = self._options.get("image_lora_load_kwargs") or {}
        for name, path in adapters:
            if not Path(path).exists():
                raise Refused(f"The LoRA {name!r} is not there: {path}.")
            try:
                where, file_name = (path, None) if Path(path).is_dir() else (str(Path(path).parent), Path(path).name)
                more = {"weight_name": file_name} if file_name else {}
                self._base.load_lora_weights(where, adapter_name=name, **more, **load_kwargs)
            except Exception as exc:  # as above
                advice = "Install peft into the engine's environment." if "PEFT" in str(exc) else "Is it whole?"
                raise Refused(
                    f"The LoRA {name!r} of {path} cannot be loaded: {type(exc).__name__}: {exc} {advice}"
                ) from exc
        names = [name for name, _ in adapters]
        fuse_kwargs = self._options.get("image_lora_fuse_kwargs") or {}
        try:
            if self._options.get("gguf_file"):  # nothing can be added to such weights: the layers run beside them
                self._base.set_adapters(names, fuse_kwargs.get("lora_scale", 1.0))
            else:
                self._base.set_adapters(names)
                self._base.fuse_lora(**fuse_kwargs)
        except Exception as exc:  # as above
            raise Refused(f"The LoRAs cannot be fused: {type(exc).__name__}: {exc}") from exc

    def _save_memory(self, pipeline: Any) -> None:
        vae = getattr(pipeline, "vae", None)
        for option, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
            if self._options.get(option):
                if not hasattr(vae, method):
                    raise Refused(f"{type(pipeline).__name__} knows no {option}. Launch it without.")
                getattr(vae, method)()

    def _place(self, pipeline: Any) -> None:
        """Put its weights where it computes; again when another pipeline takes over, as each offloads for itself."""
        if self._placed is pipeline:
            return
        if self._options.get("attention_slicing"):
            pipeline.enable_attention_slicing()
        is_offloaded = self._options.get("cpu_offload") or self._options.get("sequential_cpu_offload")
        if is_offloaded and self._device == "cpu":
            raise Refused("cpu_offload is for models on a GPU; this one is on the CPU anyway. Launch it without.")
        if self._options.get("sequential_cpu_offload"):
            if self._placed is None:  # its hooks sit on the weights, which are shared
                pipeline.enable_sequential_cpu_offload(device=self._device)
        elif self._options.get("cpu_offload"):
            pipeline.enable_model_cpu_offload(device=self._device)
        elif self._placed is None:
            pipeline.to(self._device)
        if self._placed is None and self._controlnet is not None and not is_offloaded:
            for model in self._controlnet if isinstance(self._controlnet, list) else [self._controlnet]:
                model.to(self._device)
        self._placed = pipeline

    # --- which pipeline does what

    def for_task(self, task: str) -> Any:
        """The pipeline of the task. Raises Refused if the model cannot do it."""
        if task not in self._of_task:
            self._of_task[task] = self._derived(task)
            self._of_task[task].set_progress_bar_config(disable=True)
        return self._of_task[task]

    def _derived(self, task: str) -> Any:
        auto, kinds = TASKS[task]
        name = type(self._base).__name__
        more = {} if self._controlnet is None else {"controlnet": self._controlnet}
        if not more:
            if name in {kind.__name__ for kind in kinds.values()}:
                return self._base
            is_listed = any(name in {k.__name__ for k in mapping.values()} for _, mapping in TASKS.values())
            if not is_listed and self._looks_like(task):
                return self._base
        try:
            return auto.from_pipe(self._base, **more)
        except (ValueError, TypeError, AttributeError) as exc:
            raise Refused(
                f"The model {self.uid!r} ({name}) cannot {WORDS[task]}. {self._abilities_text()}", param="model"
            ) from exc

    def _looks_like(self, task: str) -> bool:
        """What a pipeline that diffusers lists nowhere is for, by its arguments."""
        known = self.parameters(self._base)
        if task == "inpainting":
            return "mask_image" in known
        needs_image = "image" in known and known["image"].default is inspect.Parameter.empty
        return "image" in known if task == "image2image" else not needs_image

    def _abilities_text(self) -> str:
        name = type(self._base).__name__
        can = [WORDS[task] for task, (_, kinds) in TASKS.items() if name in {kind.__name__ for kind in kinds.values()}]
        return f"It can {' and '.join(can)}." if can else "Choose another model."

    @property
    def is_steered(self) -> bool:
        """Whether pictures steer it through a controlnet."""
        return self._controlnet is not None

    @property
    def base(self) -> Any:
        """The pipeline that the model's files name."""
        return self._base

    def multiple(self) -> int:
        """Widths and heights that the model makes are multiples of it."""
        names = ("vae_scale_factor", "vae_scale_factor_spatial")
        factor = int(next((value for name in names if (value := getattr(self._base, name, None))), 8))
        return factor * 2 if hasattr(self._base, "transformer") else factor

    # --- running

    def run(self, pipeline: Any, wish: Wish, job: Job, inputs: dict[str, Any]) -> list[tuple[int, Any]]:
        """What the pipeline gives for each picture wished for, each with its seed: seed, seed + 1, ...

        One at a time, so that each is what it would be alone, and memory does not grow with `n`.

        Raises:
            Refused: the pipeline does not take an argument, or not so.
            Cancelled: nobody wants it any more.
        """
        arguments = self.arguments(pipeline, wish) | inputs
        scheduler = self._scheduler(pipeline, wish.scheduler)
        kept = getattr(pipeline, "scheduler", None)
        self._place(pipeline)
        prompts = [prompt for prompt in wish.prompts for _ in range(wish.n)]
        results = []
        try:
            for index, prompt in enumerate(prompts):
                job.step(index, len(prompts))
                if scheduler is not None:  # a fresh one: it remembers earlier pictures
                    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
                seed = (wish.seed + index) % 2**64
                generator = torch.Generator("cpu").manual_seed(seed)  # the same on any device
                steps = _Steps(job, len(prompts), index, arguments.get("num_inference_steps") or 50)
                results.append((seed, self._call(pipeline, prompt, generator, arguments, steps)))
        except Cancelled:
            if hasattr(pipeline, "maybe_free_model_hooks"):
                pipeline.maybe_free_model_hooks()
            raise
        finally:
            if kept is not None:
                pipeline.scheduler = kept
        return results

    def _call(
        self, pipeline: Any, prompt: str, generator: torch.Generator, arguments: dict[str, Any], steps: _Steps
    ) -> Any:
        known = self.parameters(pipeline)
        more: dict[str, Any] = {"generator": generator} if "generator" in known else {}
        if "callback_on_step_end" in known:
            more["callback_on_step_end"] = steps.on_step_end
        elif "callback" in known:
            more |= {"callback": steps.on_step, "callback_steps": 1}
        if "output_type" in known:
            more["output_type"] = "pil"
        try:
            return pipeline(prompt=prompt, **arguments, **more)
        except (ValueError, TypeError, AssertionError) as exc:
            if is_out_of_memory(exc):
                raise
            raise Refused(f"{type(pipeline).__name__} does not take this: {exc}") from exc
        except (NameError, ImportError) as exc:  # diffusers looks for some libraries only when it needs them
            raise Refused(
                f"{type(pipeline).__name__} needs a library that is missing: {exc}. Install it into the engine's "
                "environment.",
                status=501,
                code="missing_library",
            ) from exc

    @staticmethod
    def parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
        """What a pipeline can be called with."""
        return dict(inspect.signature(type(pipeline).__call__).parameters)

    def arguments(self, pipeline: Any, wish: Wish) -> dict[str, Any]:
        """The wish's own arguments. Raises Refused, naming what the pipeline takes, for one that it does not know."""
        known = self.parameters(pipeline)
        allowed = sorted(name for name in known if name not in OURS and not name.endswith(NO_JSON))
        for name in wish.arguments:
            if name not in allowed and name not in wish.optional:
                raise Refused(
                    f"{type(pipeline).__name__} does not know `{name}`. It takes: {', '.join(allowed)}; and any "
                    "request takes: prompt, n, size, seed, sampler_name, request_id, output_format.",
                    param=name,
                )
        found = {name: value for name, value in wish.arguments.items() if name in allowed}
        if "num_images_per_prompt" in known:
            found["num_images_per_prompt"] = 1
        if wish.negative_prompt and "negative_prompt" in known:
            found["negative_prompt"] = wish.negative_prompt
        elif wish.negative_prompt and "negative_prompt" not in wish.optional:
            raise Refused(f"{type(pipeline).__name__} takes no `negative_prompt`.", param="negative_prompt")
        if "strength" in known and "num_inference_steps" in known:
            strength = found.get("strength", known["strength"].default)
            steps = found.get("num_inference_steps", known["num_inference_steps"].default)
            if isinstance(strength, int | float) and isinstance(steps, int) and steps * strength < 1:
                raise Refused(
                    f"`strength` {strength:g} of {steps} steps is not one step. Raise either.", param="strength"
                )
        return found

    def _scheduler(self, pipeline: Any, name: str | None) -> Any:
        """The scheduler of that name, or the model's own; None if the pipeline has none."""
        own = getattr(pipeline, "scheduler", None)
        name = name or self._options.get("scheduler")
        if own is None or not name:
            return own
        class_name, more = samplers.find(name)
        kind = getattr(diffusers, class_name, None)
        compatible = {one.__name__ for one in getattr(own, "compatibles", ())} | {type(own).__name__}
        if kind is None or class_name not in compatible:
            fitting = [known for known, (of, _) in samplers.SAMPLERS.items() if of in compatible]
            raise Refused(
                f"This model has no sampler {name!r}. It has: {', '.join([*fitting, *sorted(compatible)])}.",
                param="sampler_name",
            )
        return kind.from_config(own.config, **more)


class _Steps:
    """Tells the job of each step of one picture among several."""

    def __init__(self, job: Job, pictures: int, index: int, steps: int) -> None:
        self._job, self._steps = job, steps
        self._share, self._begin = 1 / pictures, index / pictures

    def on_step_end(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """As `callback_on_step_end`."""
        total = getattr(pipeline, "_num_timesteps", None)
        self._job.step(step + 1, total if isinstance(total, int) else self._steps, self._share, self._begin)
        return tensors

    def on_step(self, step: int, timestep: Any, latents: Any) -> None:
        """As `callback`, which older pipelines have."""
        self._job.step(step + 1, self._steps, self._share, self._begin)


def gguf_transformer(folder: Path, file: Path, dtype: torch.dtype) -> Any:
    """The transformer of a pipeline's folder, with its weights out of a GGUF file.

    Raises:
        Refused: the pipeline has no transformer, or the file is not there.
    """
    if not file.is_file():
        raise Refused(f"There is no GGUF file {file}.")
    index = json.loads((folder / "model_index.json").read_text())
    library, name = (index.get("transformer") or [None, None])[:2]
    kind = getattr(diffusers, str(name), None)
    if library != "diffusers" or kind is None or not hasattr(kind, "from_single_file"):
        raise Refused(f"{index.get('_class_name')} of {folder} takes no transformer out of a GGUF file.")
    return kind.from_single_file(
        str(file),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        config=str(folder),
        subfolder="transformer",
        torch_dtype=dtype,
        local_files_only=True,
    )


def _dtype_of(name: str | None, device: str) -> torch.dtype:
    """By name; auto is what the device is best at."""
    if name and name != "auto":
        return getattr(torch, name)
    if device == "cpu":
        return torch.float32
    if device.startswith("cuda") and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float16


def _why_not_loaded(path: Path, exc: Exception) -> str:
    if isinstance(exc, ImportError):
        return f"{path} needs a library that is missing: {exc} Install it into the engine's environment."
    return f"{path} cannot be loaded: {type(exc).__name__}: {exc} Are its files whole?"
