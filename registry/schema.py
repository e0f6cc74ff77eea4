"""What the catalogue and registrations say of a model. Key names are those of the JSON files.

There is one Struct for each model type. `ModelFamily` is their union, told apart by `model_type` where families
are stored as part of something else. A family's own JSON (the version-2 form, which `decode_family` reads and
`encode_family` writes) has no such key: there the type is known from where the JSON is.

Older forms of the JSON are not known here; see `registry/compat.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from registry.decode import DecodeError, check_plain, decode, did_you_mean, faults, nearest, schema

GGUF = "ggufv2"
# In place of a hub: the model has no files of its own.
NO_FILES = "none"

LLM_FORMATS = ("pytorch", "gptq", "awq", "fp4", "fp8", "bnb", "mlx", GGUF)
# embedding and rerank
VECTOR_FORMATS = ("pytorch", GGUF)
FORMATS: dict[str, tuple[str, ...]] = {"LLM": LLM_FORMATS, "embedding": VECTOR_FORMATS, "rerank": VECTOR_FORMATS}

# What a family of a type may say that it can do. The other types take any text.
ABILITIES: dict[str, tuple[str, ...]] = {
    "LLM": ("embed", "generate", "chat", "tools", "vision", "audio", "omni", "reasoning", "hybrid"),
    "embedding": ("embed", "embed_vision", "embed_video", "embed_audio"),
    "rerank": ("rerank", "rerank_vision", "rerank_video", "rerank_audio"),
}

RERANK_TYPES = ("unknown", "normal", "LLM-based", "LLM-based layerwise")

Text = str | None


def _one_of(words: tuple[str, ...], description: str) -> Meta:
    return Meta(description=description, extra_json_schema={"enum": list(words)})


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a spec's files are on one hub.

    `files` are glob patterns of what is needed there (empty: everything an engine could need), the one to load
    first. `allow_patterns` and `ignore_patterns` narrow that "everything". For hub `local`, `model_id` is an
    absolute path.
    """

    model_hub: str
    model_id: str
    model_revision: str | None = None
    files: tuple[str, ...] = ()
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class Virtualenv(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The Python environment that a model wants for itself."""

    packages: Annotated[tuple[str, ...], Meta(description="requirements to install")] = ()
    inherit_pip_config: Annotated[bool, Meta(description="use the indexes that pip is set up for")] = True
    index_url: Annotated[Text, Meta(description="package index")] = None
    extra_index_url: Annotated[str | tuple[str, ...] | None, Meta(description="further package indexes")] = None
    find_links: Annotated[str | tuple[str, ...] | None, Meta(description="folders or pages of wheels")] = None
    trusted_host: Annotated[str | tuple[str, ...] | None, Meta(description="hosts without a valid certificate")] = None
    index_strategy: Annotated[Text, Meta(description="how several indexes are searched, in uv's words")] = None
    no_build_isolation: Annotated[bool | None, Meta(description="build source distributions in place")] = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item of `model_specs`: a format and size, with its source and quantization.

    The fields from `engine` on belong to types that have no `model_specs` in their JSON.
    """

    model_format: Annotated[str, _one_of(LLM_FORMATS, "how the weights are stored")]
    model_size_in_billions: Annotated[
        int | float | str | None, Meta(description="parameters in billions; 0_5 is half a billion")
    ] = None
    quantization: Annotated[str, Meta(description="such as none, Int4, 4bit, fp8, Q4_K_M")] = "none"
    model_hub: Annotated[str, Meta(description="where model_id is: huggingface, modelscope, pypi, ...")] = "huggingface"
    model_id: Annotated[Text, Meta(description="repository on the hub; {quantization} is replaced")] = None
    model_uri: Annotated[
        Text, Meta(description="files on the server: an absolute path or file:// address of a folder or GGUF file")
    ] = None
    model_revision: Annotated[Text, Meta(description="commit, tag or version on the hub")] = None
    activated_size_in_billions: Annotated[
        int | float | str | None, Meta(description="parameters used for each token, of a mixture of experts")
    ] = None
    model_file_name_template: Annotated[Text, Meta(description="the GGUF file's name; {quantization} is replaced")] = (
        None
    )
    model_file_name_split_template: Annotated[
        Text, Meta(description="the name of each part of a GGUF file; {quantization} and {part} are replaced")
    ] = None
    quantization_parts: Annotated[
        dict[str, tuple[str, ...]] | None, Meta(description="the parts of each quantization that is split")
    ] = None
    multimodal_projectors: Annotated[tuple[str, ...] | None, Meta(description="projector files to choose from")] = None
    multimodal_projector: Annotated[Text, Meta(description="the projector file")] = None
    draft_model_id: Annotated[Text, Meta(description="repository of a small model that drafts")] = None
    draft_quantizations: Annotated[tuple[str, ...] | None, Meta(description="quantizations of the draft model")] = None
    draft_model_revision: Annotated[Text, Meta(description="revision of the draft model")] = None
    draft_model_file_name_template: Annotated[Text, Meta(description="GGUF file name of the draft model")] = None
    engine: Annotated[Text, Meta(description="the engine that these files are for")] = None
    gguf_model_id: Annotated[Text, Meta(description="repository of GGUF weights")] = None
    gguf_quantizations: Annotated[tuple[str, ...] | None, Meta(description="quantizations of those")] = None
    gguf_model_file_name_template: Annotated[Text, Meta(description="GGUF file; {quantization} is replaced")] = None
    lightning_model_id: Annotated[Text, Meta(description="repository of weights for few steps")] = None
    lightning_versions: Annotated[tuple[str, ...] | None, Meta(description="versions of those")] = None
    lightning_model_file_name_template: Annotated[
        Text, Meta(description="their file; {lightning_version} is replaced")
    ] = None
    text_encoder_model_id: Annotated[Text, Meta(description="repository of the text encoder")] = None


class Family(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="model_type"):
    """What families of all types have. `extra` holds the keys of its JSON that mean nothing to us."""

    model_name: Annotated[str, Meta(description="its name; unique within a type")]
    version: Annotated[int, Meta(description="of this form: 2")] = 2
    cache_config: Annotated[
        dict[str, Any] | None, Meta(description="for the download: allow_patterns, ignore_patterns")
    ] = None
    virtualenv: Annotated[Virtualenv | None, Meta(description="the Python environment it wants")] = None
    is_builtin: Annotated[bool, Meta(description="whether it ships with the server; ignored")] = False
    extra: dict[str, Any] = {}

    @property
    def model_type(self) -> str:
        """Which group of families this belongs to."""
        return str(type(self).__struct_config__.tag)

    @property
    def abilities(self) -> tuple[str, ...]:
        """What it can do."""
        return getattr(self, "model_ability", None) or ()

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Its formats, sizes and sources, in order of preference."""
        return ()


class LLMFamily(Family, frozen=True, kw_only=True, omit_defaults=True, tag="LLM"):
    """A language model: one entry of the catalogue, or one registration."""

    model_specs: Annotated[
        tuple[ModelSpec, ...], Meta(description="its formats and sizes; the first that fits is used")
    ]
    context_length: Annotated[int, Meta(description="tokens that it was trained for")] = 2048
    model_lang: Annotated[tuple[str, ...], Meta(description="languages, such as en")] = ("en",)
    model_ability: Annotated[
        tuple[Annotated[str, _one_of(ABILITIES["LLM"], "an ability")], ...], Meta(description="what it can do")
    ] = ("generate",)
    model_description: Annotated[Text, Meta(description="a sentence for people")] = None
    model_family: Annotated[
        Text, Meta(description="a built-in model that it derives from, or any text; lends what is not given here")
    ] = None
    chat_template: Annotated[
        Text, Meta(description="a Jinja template or a built-in model's name; none: the one in the model's files")
    ] = None
    stop_token_ids: Annotated[tuple[int, ...] | None, Meta(description="tokens that end an answer")] = None
    stop: Annotated[tuple[str, ...] | None, Meta(description="texts that end an answer")] = None
    reasoning_start_tag: Annotated[Text, Meta(description="begins the reasoning, such as <think>")] = None
    reasoning_end_tag: Annotated[Text, Meta(description="ends the reasoning, such as </think>")] = None
    architectures: Annotated[tuple[str, ...] | None, Meta(description="as in the model's config.json")] = None
    tool_parser: Annotated[Text, Meta(description="how tool calls are written: qwen, llama3, deepseek-v3, ...")] = None
    has_chat_template: Annotated[bool, Meta(description="whether its files are known to hold a template")] = False

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Its `model_specs`."""
        return self.model_specs


class EmbeddingFamily(Family, frozen=True, kw_only=True, omit_defaults=True, tag="embedding"):
    """A model that turns inputs into vectors."""

    model_specs: Annotated[tuple[ModelSpec, ...], Meta(description="its formats; the first that fits is used")]
    dimensions: Annotated[int | None, Meta(description="length of a vector")] = None
    max_tokens: Annotated[int | None, Meta(description="tokens of one input")] = None
    language: Annotated[tuple[str, ...], Meta(description="languages, such as en")] = ("en",)
    model_ability: Annotated[
        tuple[Annotated[str, _one_of(ABILITIES["embedding"], "an ability")], ...] | None,
        Meta(description="what it can embed beside text"),
    ] = None

    @property
    def abilities(self) -> tuple[str, ...]:
        """What it can do; `embed` always."""
        return _with_first("embed", self.model_ability)

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Its `model_specs`."""
        return self.model_specs


class RerankFamily(Family, frozen=True, kw_only=True, omit_defaults=True, tag="rerank"):
    """A model that orders documents by a query."""

    model_specs: Annotated[tuple[ModelSpec, ...], Meta(description="its formats; the first that fits is used")]
    language: Annotated[tuple[str, ...], Meta(description="languages, such as en")] = ("en",)
    type: Annotated[str, _one_of(RERANK_TYPES, "how it scores; unknown: told from its files")] = "unknown"
    max_tokens: Annotated[int | None, Meta(description="tokens of a query and a document")] = None
    model_ability: Annotated[
        tuple[Annotated[str, _one_of(ABILITIES["rerank"], "an ability")], ...] | None,
        Meta(description="what it can rank beside text"),
    ] = None

    @property
    def abilities(self) -> tuple[str, ...]:
        """What it can do; `rerank` always."""
        return _with_first("rerank", self.model_ability)

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Its `model_specs`."""
        return self.model_specs


class FlatFamily(Family, frozen=True, kw_only=True, omit_defaults=True):
    """What types have whose JSON names one source, beside the name.

    Families of the catalogue have several sources: these are their `model_specs`, and go before the one.
    """

    model_id: Annotated[Text, Meta(description="repository on the hub")] = None
    model_revision: Annotated[Text, Meta(description="commit, tag or version on the hub")] = None
    model_hub: Annotated[str, Meta(description="where model_id is: huggingface, modelscope, ...")] = "huggingface"
    model_uri: Annotated[Text, Meta(description="a folder on the server: an absolute path or file:// address")] = None
    model_format: Annotated[Text, Meta(description="how the weights are stored")] = None
    quantization: Annotated[Text, Meta(description="such as 4bit")] = None
    model_specs: Annotated[tuple[ModelSpec, ...], Meta(description="several sources, in place of the one")] = ()

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Its sources: `model_specs`, or else the one that the family itself names."""
        if self.model_specs:
            return self.model_specs
        own = {field: value for field in SHARED_FIELDS if (value := getattr(self, field, None)) is not None}
        own.setdefault("model_format", GGUF if (self.model_uri or "").lower().endswith(".gguf") else "pytorch")
        return (ModelSpec(**own),)


class ImageFamily(FlatFamily, frozen=True, kw_only=True, omit_defaults=True, tag="image"):
    """A model that makes, changes or reads pictures."""

    model_family: Annotated[Text, Meta(description="what loads it: stable_diffusion, ocr, ...")] = None
    model_ability: Annotated[
        tuple[str, ...] | None, Meta(description="text2image, image2image, inpainting, ocr, ...")
    ] = None
    controlnet: Annotated[tuple[dict[str, Any], ...] | None, Meta(description="models of this form that steer it")] = (
        None
    )
    default_model_config: Annotated[dict[str, Any] | None, Meta(description="options of its loading")] = {}
    default_generate_config: Annotated[dict[str, Any] | None, Meta(description="options of each picture")] = {}
    gguf_model_id: Annotated[Text, Meta(description="repository of GGUF weights")] = None
    gguf_quantizations: Annotated[tuple[str, ...] | None, Meta(description="quantizations of those")] = None
    gguf_model_file_name_template: Annotated[Text, Meta(description="GGUF file; {quantization} is replaced")] = None
    lightning_model_id: Annotated[Text, Meta(description="repository of weights for few steps")] = None
    lightning_versions: Annotated[tuple[str, ...] | None, Meta(description="versions of those")] = None
    lightning_model_file_name_template: Annotated[
        Text, Meta(description="their file; {lightning_version} is replaced")
    ] = None


class AudioFamily(FlatFamily, frozen=True, kw_only=True, omit_defaults=True, tag="audio"):
    """A model that hears or speaks."""

    model_family: Annotated[Text, Meta(description="what loads it: whisper, ChatTTS, CosyVoice, Kokoro, ...")] = None
    multilingual: Annotated[bool, Meta(description="whether it knows several languages")] = False
    language: Annotated[Text, Meta(description="its language, if one")] = None
    model_lang: Annotated[tuple[str, ...] | None, Meta(description="its languages")] = None
    model_ability: Annotated[tuple[str, ...] | None, Meta(description="audio2text, text2audio, ...")] = None
    default_model_config: Annotated[dict[str, Any] | None, Meta(description="options of its loading")] = None
    default_transcription_config: Annotated[dict[str, Any] | None, Meta(description="options of transcribing")] = None
    engine: Annotated[Text, Meta(description="what runs it: transformers, PyTorch, MLX, ...")] = None


class VideoFamily(FlatFamily, frozen=True, kw_only=True, omit_defaults=True, tag="video"):
    """A model that makes moving pictures."""

    model_family: Annotated[Text, Meta(description="what loads it: CogVideoX, HunyuanVideo, Wan, ...")] = None
    model_ability: Annotated[
        tuple[str, ...] | None, Meta(description="text2video, image2video, firstlastframe2video")
    ] = None
    default_model_config: Annotated[dict[str, Any] | None, Meta(description="options of its loading")] = {}
    default_generate_config: Annotated[dict[str, Any] | None, Meta(description="options of each film")] = {}
    engine: Annotated[Text, Meta(description="what runs it: diffusers, MLX, ...")] = None
    gguf_model_id: Annotated[Text, Meta(description="repository of GGUF weights")] = None
    gguf_quantizations: Annotated[tuple[str, ...] | None, Meta(description="quantizations of those")] = None
    gguf_model_file_name_template: Annotated[Text, Meta(description="GGUF file; {quantization} is replaced")] = None
    lightning_model_id: Annotated[Text, Meta(description="repository of weights for few steps")] = None
    lightning_versions: Annotated[tuple[str, ...] | None, Meta(description="versions of those")] = None
    lightning_model_file_name_template: Annotated[
        Text, Meta(description="their file; {lightning_version} is replaced")
    ] = None
    text_encoder_model_id: Annotated[Text, Meta(description="repository of the text encoder")] = None


class FlexibleFamily(FlatFamily, frozen=True, kw_only=True, omit_defaults=True, tag="flexible"):
    """Any model, run by a launcher that is named with it."""

    launcher: Annotated[str, Meta(description="dotted name of the program that runs it")] = ""
    launcher_args: Annotated[Text, Meta(description="what the launcher is told: JSON text of an object")] = None
    model_description: Annotated[Text, Meta(description="a sentence for people")] = None

    @property
    def abilities(self) -> tuple[str, ...]:
        """It answers; what, its launcher knows."""
        return ("flexible",)

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Its sources; a launcher may do without any."""
        if self.model_uri is not None or self.model_id or self.model_specs:
            return super().specs
        return (ModelSpec(model_format="none", model_hub=NO_FILES, model_id=self.model_name),)


ModelFamily = LLMFamily | EmbeddingFamily | RerankFamily | ImageFamily | AudioFamily | VideoFamily | FlexibleFamily

# model type, as spelt everywhere -> what a family of it is
FAMILIES: dict[str, type[ModelFamily]] = {
    "LLM": LLMFamily,
    "embedding": EmbeddingFamily,
    "rerank": RerankFamily,
    "image": ImageFamily,
    "audio": AudioFamily,
    "video": VideoFamily,
    "flexible": FlexibleFamily,
}

# What a family's own JSON must have.
REQUIRED: dict[str, tuple[str, ...]] = {
    "LLM": ("model_name", "model_lang", "model_ability", "model_family", "model_specs"),
    "embedding": ("model_name", "dimensions", "max_tokens", "language", "model_specs"),
    "rerank": ("model_name", "language", "model_specs"),
    "image": ("model_name", "model_family"),
    "audio": ("model_name", "model_family", "multilingual"),
    "video": ("model_name", "model_family"),
    "flexible": ("model_name", "launcher"),
}
REQUIRED_OF_SPEC: dict[str, tuple[str, ...]] = {"LLM": ("model_format", "model_size_in_billions")}

# Types whose JSON may have keys that we do not know: they are kept. Elsewhere such keys are dropped.
KEEPS_UNKNOWN = frozenset({"LLM", "embedding", "rerank", "image", "audio"})

# The keys of a spec's JSON that are always written, in this order; others if they are set.
_SPEC_KEYS = ("model_format", "quantization", "model_id", "model_hub", "model_uri", "model_revision")
_GGUF_KEYS = ("model_file_name_template", "model_file_name_split_template", "quantization_parts")
SPEC_KEYS: dict[str, tuple[str, ...]] = {
    "LLM": ("model_size_in_billions", *_SPEC_KEYS, "activated_size_in_billions"),
    "embedding": _SPEC_KEYS,
    "rerank": _SPEC_KEYS,
}
GGUF_KEYS: dict[str, tuple[str, ...]] = {
    "LLM": (*_GGUF_KEYS, "multimodal_projectors"),
    "embedding": (*_GGUF_KEYS, "multimodal_projector"),
    "rerank": (*_GGUF_KEYS, "multimodal_projector"),
}

# Fields of a family's own JSON that are written only if they are set.
RARE = frozenset({"has_chat_template"})
RARE_OF_FLAT = frozenset({"model_specs", "model_format", "quantization"})

SHARED_FIELDS = tuple(
    sorted(
        set(ModelSpec.__struct_fields__)
        & {field for kind in (ImageFamily, AudioFamily, VideoFamily) for field in kind.__struct_fields__}
    )
)

_SIZE = re.compile(r"\d{1,9}([._]\d{1,9})?")


# -- a family's own JSON


def decode_family(model_type: str, data: object) -> ModelFamily:
    """A family from its own JSON, in the version-2 form.

    Null stands for the default. Numbers written as text are taken for numbers where a number belongs, and the
    other way round. Keys that are not known are kept in `extra`, or dropped where the type does not keep them.

    Raises:
        DecodeError: naming the path of the first thing that is wrong, and what is allowed there.
    """
    kind = FAMILIES.get(model_type)
    if kind is None:
        raise DecodeError(f"Unsupported model type: {model_type}. {did_you_mean(model_type, FAMILIES)}")
    if not isinstance(data, Mapping):
        raise DecodeError(f"Expected `object`, got `{type(data).__name__}` - at `$`")
    check_plain(data)
    said_type = data.get("model_type", model_type)
    if said_type != model_type and said_type in FAMILIES:
        raise DecodeError(f"This is a model of type {said_type!r}, not {model_type!r} - at `$.model_type`")
    known = _fields(kind).keys() - {"extra"}
    own = _own(data, kind)
    for fault in _missing(own, model_type):
        raise DecodeError(fault)
    try:
        family: ModelFamily = msgspec.convert(own, kind)
    except msgspec.ValidationError:
        family = decode(own, kind)  # the slow way, which names the place
    for fault in _wrong_words(own, model_type):
        raise DecodeError(fault)
    if model_type in KEEPS_UNKNOWN:
        extra = {key: value for key, value in data.items() if key not in known and key != "model_type"}
        family = msgspec.structs.replace(family, extra=extra)
    return family


def faults_of(model_type: str, data: Mapping[str, Any]) -> list[str]:
    """All that `decode_family` could complain of, each with its path; none if it takes the data."""
    kind = FAMILIES[model_type]
    own = _own(data, kind)
    found = [*_missing(own, model_type), *faults(own, kind), *_wrong_words(own, model_type)]
    return list(dict.fromkeys(found))


def encode_family(family: ModelFamily) -> dict[str, Any]:
    """A family's own JSON, in the version-2 form: all defaults filled in, the type left out."""
    data: dict[str, Any] = {}
    rare = RARE_OF_FLAT if isinstance(family, FlatFamily) else RARE
    for field in family.__struct_fields__:
        value = getattr(family, field)
        if field == "extra" or (not value and field in rare):
            continue
        if field == "model_specs":
            data[field] = [_encode_spec(spec, family.model_type) for spec in value]
        elif isinstance(value, Virtualenv):
            data[field] = {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
        else:
            data[field] = _plain(value)
    return data | {key: value for key, value in family.extra.items() if key not in data}


def _encode_spec(spec: ModelSpec, model_type: str) -> dict[str, Any]:
    always = SPEC_KEYS.get(model_type, _SPEC_KEYS)
    if spec.model_format == GGUF:
        always += GGUF_KEYS.get(model_type, ())
    values = {key: getattr(spec, key) for key in always}
    values |= {key: value for key in spec.__struct_fields__ if (value := getattr(spec, key)) is not None}
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """The value with lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def unknown_keys(model_type: str, data: Mapping[str, Any]) -> list[tuple[str, str, Iterable[str]]]:
    """Keys of a family's JSON that mean nothing here: the path of what holds it, the key, and the known ones."""
    known = _fields(FAMILIES[model_type]).keys() - {"extra"}
    found: list[tuple[str, str, Iterable[str]]] = [
        ("$", key, known) for key in data if key not in known and key != "model_type"
    ]
    specs = data.get("model_specs")
    for index, spec in enumerate(specs if isinstance(specs, list | tuple) else ()):
        if isinstance(spec, Mapping):
            of_spec = _fields(ModelSpec).keys()
            found += [(f"$.model_specs[{index}]", key, of_spec) for key in spec if key not in of_spec]
    return found


def family_schema(model_type: str) -> dict[str, Any]:
    """The JSON Schema of a family's own JSON, for editors.

    Raises:
        DecodeError: there is no such type.
    """
    kind = FAMILIES.get(model_type)
    if kind is None:
        raise DecodeError(f"Unsupported model type: {model_type}. {did_you_mean(model_type, FAMILIES)}")
    whole = schema(kind)
    definitions = whole["$defs"]
    family = definitions.pop(kind.__name__)
    properties = {key: value for key, value in family["properties"].items() if key not in ("model_type", "extra")}
    for value in properties.values():
        _allow_null(value)
    spec = definitions.get(ModelSpec.__name__)
    if spec:
        spec["required"] = list(REQUIRED_OF_SPEC.get(model_type, ("model_format",)))
        if model_type in FORMATS:
            spec["properties"]["model_format"]["enum"] = list(FORMATS[model_type])
        else:
            spec["properties"]["model_format"].pop("enum")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A {model_type} model",
        "description": family["description"],
        "type": "object",
        "properties": properties,
        "required": list(REQUIRED[model_type]),
        "$defs": definitions,
    }


def _allow_null(value: dict[str, Any]) -> None:
    """Null stands for a default, so it is right wherever there is one."""
    if value.get("default") is not None and isinstance(value.get("type"), str):
        value["type"] = [value["type"], "null"]
        if "enum" in value:
            value["enum"] = [*value["enum"], None]


# -- small parts


def _with_first(first: str, abilities: tuple[str, ...] | None) -> tuple[str, ...]:
    return (first, *(ability for ability in abilities or () if ability != first))


@cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Field -> its type without notes and None, and whether None is a value of it."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        if name in kind.__struct_fields__:  # type: ignore[attr-defined]
            kinds = get_args(hint) if get_origin(hint) is not None and NoneType in get_args(hint) else (hint,)
            plain = tuple(one for one in kinds if one is not NoneType)
            found[name] = (plain[0] if len(plain) == 1 else plain, len(plain) < len(kinds))
    return found


def _relaxed(data: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The data with nulls for defaults left out and scalars in the spelling that their field wants."""
    fields = _fields(kind)
    relaxed = {}
    for key, value in data.items():
        if key not in fields:
            continue
        wanted, takes_null = fields[key]
        if value is None and not takes_null:
            continue
        relaxed[key] = _relaxed_value(value, wanted)
    return relaxed


def _relaxed_value(value: Any, wanted: Any) -> Any:
    if isinstance(value, str):
        if wanted is int and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value):
            return int(value)
        if wanted is bool and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
    if wanted is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(wanted, type) and issubclass(wanted, msgspec.Struct) and isinstance(value, Mapping):
        return _relaxed(value, wanted)
    if get_origin(wanted) is tuple and isinstance(value, list | tuple):
        return [_relaxed_value(item, get_args(wanted)[0]) for item in value]
    return value


def _own(data: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What of the data is the family's, relaxed."""
    known = _fields(kind).keys() - {"extra"}
    return _relaxed({key: value for key, value in data.items() if key in known}, kind)


def _missing(data: Mapping[str, Any], model_type: str) -> Iterator[str]:
    for key in REQUIRED[model_type]:
        if data.get(key) is None:
            yield f"Required key {key!r} is missing - at `$`"
    specs = data.get("model_specs")
    for index, spec in enumerate(specs if isinstance(specs, list | tuple) else ()):
        if not isinstance(spec, Mapping):
            continue
        for key in REQUIRED_OF_SPEC.get(model_type, ("model_format",)):
            if spec.get(key) is None:
                yield f"Required key {key!r} is missing - at `$.model_specs[{index}]`"


def _wrong_words(data: Mapping[str, Any], model_type: str) -> Iterator[str]:
    """What is not on its list, of the words that have one. What is no word at all is for the decoder to tell."""
    versions = (1, 2) if model_type == "flexible" else (2,)
    version = data.get("version", 2)
    if isinstance(version, int) and version not in versions:
        yield f"Expected version 2, got {version} - at `$.version`"
    for index, ability in enumerate(_items(data, "model_ability")):
        yield from _wrong_word(ability, ABILITIES.get(model_type), "ability", f"$.model_ability[{index}]")
    if model_type == "rerank":
        yield from _wrong_word(data.get("type", RERANK_TYPES[0]), RERANK_TYPES, "type", "$.type")
    if model_type == "flexible":
        yield from _wrong_launcher_args(data.get("launcher_args"))
    for index, spec in enumerate(_items(data, "model_specs")):
        if isinstance(spec, Mapping):
            path = f"$.model_specs[{index}]"
            word = spec.get("model_format")
            yield from _wrong_word(word, FORMATS.get(model_type), "model_format", f"{path}.model_format")
            for key in ("model_size_in_billions", "activated_size_in_billions"):
                yield from _wrong_size(spec.get(key), f"{path}.{key}")


def _items(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return list(value) if isinstance(value, list | tuple) else []


def _wrong_word(word: Any, allowed: tuple[str, ...] | None, what: str, path: str) -> Iterator[str]:
    if allowed is not None and isinstance(word, str) and word not in allowed:
        near = did_you_mean(word, allowed) + " " if nearest(word, allowed) else ""
        yield f"Unknown {what} {word[:100]!r} - at `{path}`. {near}Allowed: {', '.join(allowed)}."


def _wrong_size(size: Any, path: str) -> Iterator[str]:
    if isinstance(size, str):
        is_right = _SIZE.fullmatch(size) is not None
    else:
        is_right = not isinstance(size, int | float) or isinstance(size, bool) or 0 <= size < 10**9
    if not is_right:
        yield f"Expected a size in billions such as 7, 0.5 or '0_5', got {str(size)[:100]!r} - at `{path}`"


def _wrong_launcher_args(text: Any) -> Iterator[str]:
    if not isinstance(text, str):
        return
    try:
        data = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:
        yield f"Expected the JSON text of an object, but it is no JSON: {exc} - at `$.launcher_args`"
        return
    if not isinstance(data, dict):
        yield "Expected the JSON text of an object - at `$.launcher_args`"
