"""Small models of speech recognition that hear tones, and the tones: each letter has a pitch, and so has each word.

Their weights are trained in seconds, so that what they write is known: `python tests/tones.py KIND TARGET` in a Python
that has torch makes one.
"""

from __future__ import annotations

import io
import json
import math
import sys
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RATE = 16_000
TONE_S, GAP_S = 0.2, 0.1
PITCHES = {letter: 400 + 300 * n for n, letter in enumerate("abdehlorw ")}  # hertz
WORDS = {"hello": PITCHES["a"], "world": PITCHES["w"]}
LANGUAGES = {"hello": "English", "world": "German"}  # what each word counts as


def tone(pitch: float, length_s: float, loud: float = 0.3) -> list[float]:
    """A sine."""
    return [loud * math.sin(2 * math.pi * pitch * n / RATE) for n in range(int(length_s * RATE))]


def silence(length_s: float) -> list[float]:
    return [0.0] * int(length_s * RATE)


def spelled(text: str) -> list[float]:
    """A tone for each letter."""
    sound = silence(GAP_S)
    for letter in text:
        sound += tone(PITCHES[letter], TONE_S) + silence(GAP_S)
    return sound


def wav(samples: list[float]) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(b"".join(round(32767 * one).to_bytes(2, "little", signed=True) for one in samples))
    return content.getvalue()


# --- the models


def make_tone_ctc(folder: str) -> None:
    """wav2vec2, which writes the letters whose tones it hears."""
    import random

    import torch
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    random.seed(0)
    torch.manual_seed(0)
    letters = {letter.replace(" ", "|"): n for n, letter in enumerate(PITCHES, 1)}
    words = Path(folder) / "vocab.json"
    words.write_text(json.dumps({"<pad>": 0} | letters | {"<unk>": len(letters) + 1}))
    tokenizer = Wav2Vec2CTCTokenizer(str(words), pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    config = Wav2Vec2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        pad_token_id=0,
    )
    model = Wav2Vec2ForCTC(config)
    model.train()
    step = config.inputs_to_logits_ratio
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        sounds, labels = [], []
        for _ in range(8):
            text = random.choices(list(PITCHES), k=8)
            sounds.append(spelled("".join(text)))
            middles = [(n + 0.5) * step / RATE - GAP_S for n in range(len(sounds[-1]) // step - 1)]
            places = [divmod(middle, TONE_S + GAP_S) for middle in middles]
            labels.append(
                [
                    tokenizer.convert_tokens_to_ids(text[int(n)].replace(" ", "|")) if 0.02 < at < TONE_S - 0.02 else 0
                    for n, at in places
                ]
            )
        heard = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_values
        heard += torch.randn_like(heard) * random.choice([0.0, 0.05])
        logits = model(heard).logits
        wanted = torch.tensor(labels)[:, : logits.shape[1]]
        loss = torch.nn.functional.cross_entropy(logits[:, : wanted.shape[1]].transpose(1, 2), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)


def word_tokenizer(words: list[str], **special: str) -> Any:
    """A token for each word and each special text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581")
    inner.decoder = decoders.Metaspace(replacement="\u2581")
    inner.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def heard_word(lengths_s: Sequence[float]) -> tuple[str, list[float]]:
    """One of WORDS and its tone, not always as long and as loud."""
    import random

    word = random.choice(sorted(WORDS))
    return word, silence(GAP_S) + tone(WORDS[word], random.choice(lengths_s), random.choice([0.1, 0.3]))


def make_tone_moonshine(folder: str) -> None:
    """moonshine, which writes the word whose tone it hears."""
    import random

    import torch
    from transformers import (
        MoonshineConfig,
        MoonshineForConditionalGeneration,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Processor,
    )

    random.seed(0)
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["\u2581hello", "\u2581world"], bos_token="<s>", eos_token="</s>")
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = MoonshineForConditionalGeneration(
        MoonshineConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
            decoder_start_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **ends,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        pairs = [heard_word((0.5, 1, 2)) for _ in range(8)]
        given = extractor([sound for _, sound in pairs], sampling_rate=RATE, padding=True, return_tensors="pt")
        labels = tokenizer([f"{word}</s>" for word, _ in pairs], return_tensors="pt").input_ids
        loss = model(**given, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)


CHAT = """{%- for message in messages -%}<|im_start|>{{ message.role }} {% if message.content is string -%}
{{ message.content }}{%- else -%}{%- for part in message.content -%}
{%- if part.type == "audio" -%}<|audio_start|><|audio_pad|><|audio_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- if not (loop.last and continue_final_message) -%}<|im_end|> {%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant {% endif -%}"""


def make_tone_qwen3_asr(folder: str) -> None:
    """Qwen3-ASR, which writes the word whose tone it hears, after the language if it is not told."""
    import random

    import torch
    from transformers import (
        Qwen3ASRConfig,
        Qwen3ASRFeatureExtractor,
        Qwen3ASRForConditionalGeneration,
        Qwen3ASRProcessor,
    )

    random.seed(0)
    torch.manual_seed(0)
    words = [
        f"\u2581{word}" for word in ("hello", "world", "system", "user", "assistant", "language", "English", "German")
    ]
    tokenizer = word_tokenizer(
        words,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        audio_token="<|audio_pad|>",
        audio_bos_token="<|audio_start|>",
        audio_eos_token="<|audio_end|>",
    )
    tokenizer.add_tokens(["<asr_text>"])
    processor = Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(), tokenizer, chat_template=CHAT)
    size = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
    model = Qwen3ASRForConditionalGeneration(
        Qwen3ASRConfig(
            audio_config={
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "d_model": 32,
                "output_dim": 32,
                "downsample_hidden_size": 16,
                "initializer_range": 0.1,
            },
            text_config=size
            | {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1},
            initializer_range=0.1,
            audio_token_id=processor.audio_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(450):
        word, sound = heard_word((1, 1, 1, 2, 2, 3, 24))
        language = random.choice([None, *LANGUAGES.values()])
        prompt = random.choice([None, *WORDS])
        given = processor.apply_transcription_request(torch.tensor(sound).numpy(), language=language, prompt=prompt)
        said = f"{word}<|im_end|>" if language else f"language {LANGUAGES[word]}<asr_text>{word}<|im_end|>"
        wanted = tokenizer(said, return_tensors="pt").input_ids
        ids = torch.cat([given.input_ids, wanted], dim=1)
        labels = torch.cat([torch.full_like(given.input_ids, -100), wanted], dim=1)
        about = given | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        loss = model(**about).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


MAKERS: dict[str, Callable[..., None]] = {
    "tone-ctc": make_tone_ctc,
    "tone-moonshine": make_tone_moonshine,
    "tone-qwen3-asr": make_tone_qwen3_asr,
}

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # two wait for each other longer than they compute
    MAKERS[sys.argv[1]](*sys.argv[2:])
