"""All families that can be named: the catalogue, and the registrations that users added.

A registration that is to last is one JSON file, `<folder>/<type in lower case>/<model_name>.json`, with the
family's own JSON. It is written whole and durably beside its final name and then linked there, so that of two
registrations of one name, even by two processes, one wins, and a crash leaves whole files only.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from registry.catalogue import CATALOGUE, Catalogue
from registry.compat import lift
from registry.decode import DecodeError, check_plain, did_you_mean, nearest, parse
from registry.hubs import local
from registry.schema import (
    FAMILIES,
    GGUF,
    KEEPS_UNKNOWN,
    FlatFamily,
    LLMFamily,
    ModelFamily,
    ModelSpec,
    decode_family,
    encode_family,
    faults_of,
    unknown_keys,
)
from registry.sources import BadUri, is_gguf, local_path, source_of

__all__ = ["CATALOGUE", "REGISTRABLE", "Registered", "RegistrationRefused", "Registry"]

logger = logging.getLogger("hostler.registry")

# The types that users can register models of; video models are those of the catalogue.
REGISTRABLE = ("LLM", "embedding", "rerank", "image", "audio", "flexible")

MAX_NAME_CHARACTERS = 100
MAX_FILE_NAME_BYTES = 200
MAX_JSON_BYTES = 2**20
MAX_SPECS = 1000
MAX_SENTENCES = 20
MAX_UNKNOWN_KEYS = 200
MAX_SHOWN = 500
STALE_AFTER_S = 3600.0

_NAME = re.compile(r"[^+\\/?%#&=\s\x00-\x1f\x7f-\x9f]+")
_JINJA = re.compile(r"\{[{%#]")
_NO_LINKS_HERE = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class RegistrationRefused(ValueError):
    """A model cannot be registered or unregistered; the text says why and what to do."""


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """What a registration became: the family, and sentences on what was read otherwise than written."""

    family: ModelFamily
    lifted: tuple[str, ...] = ()


class Registry:
    """Families by type and name. A name is unique within its type.

    `problems` are sentences on files of the registrations' folder that were skipped or are of doubtful use.
    """

    def __init__(
        self, families: Iterable[ModelFamily] = (), *, catalogue: Catalogue | None = None, folder: Path | None = None
    ) -> None:
        self.problems: list[str] = []
        self._catalogue = catalogue or Catalogue(families)
        self._folder = folder
        self._registered: dict[str, dict[str, ModelFamily]] = {model_type: {} for model_type in FAMILIES}
        self._on_disk: set[tuple[str, str]] = set()
        self._writing = threading.Lock()
        if folder is not None:
            self._load(folder)

    @classmethod
    def builtin(cls, *, extra_files: Iterable[Path] = ()) -> Registry:
        """A registry of the catalogue alone, and a site's own catalogue files over it.

        Raises:
            DecodeError: one of the site's files is wrong; the text names the file and the place.
        """
        return cls.open(None, extra_files=extra_files)

    @classmethod
    def open(cls, folder: Path | None, *, extra_files: Iterable[Path] = ()) -> Registry:
        """A registry of the catalogue and the registrations in a folder, which need not exist yet.

        Without a folder registrations last as long as the process.

        Raises:
            DecodeError: one of the site's catalogue files is wrong; the text names the file and the place.
        """
        return cls(catalogue=Catalogue(builtin=True, files=extra_files), folder=folder)

    def replace_catalogue(self, extra_files: Iterable[Path]) -> None:
        """Read the site's catalogue files again; registrations stay.

        Raises:
            DecodeError: one of the files is wrong; nothing was changed.
            RegistrationRefused: they have a name that is registered here; nothing was changed.
        """
        catalogue = Catalogue(builtin=True, files=extra_files)
        with self._writing:
            for model_type, families in self._registered.items():
                if taken := sorted(name for name in families if catalogue.has(model_type, name)):
                    raise RegistrationRefused(
                        f"The new catalogue has {', '.join(taken)}, which is registered here. Unregister it first."
                    )
            self._catalogue = catalogue

    # -- finding

    @property
    def types(self) -> tuple[str, ...]:
        """The model types that a family can have."""
        return tuple(FAMILIES)

    def find(self, model_name: str, model_type: str = "LLM") -> ModelFamily | None:
        """The family of that name: spelt exactly so, or else so but for case."""
        of_type = _type_named(model_type)
        if of_type is None:
            return None
        registered = self._registered[of_type]
        if family := registered.get(model_name) or self._catalogue.find(of_type, model_name):
            return family
        wanted = model_name.casefold()
        found = next((family for name, family in tuple(registered.items()) if name.casefold() == wanted), None)
        return found or self._catalogue.find_folded(of_type, model_name)

    def names(self, model_type: str = "LLM") -> tuple[str, ...]:
        """The names of all families of a type: the catalogue's, then registrations; none for an unknown type."""
        of_type = _type_named(model_type)
        if of_type is None:
            return ()
        return (*self._catalogue.names(of_type), *self._registered[of_type])

    def list(self, model_type: str = "LLM") -> tuple[ModelFamily, ...]:
        """All families of a type, in the order of `names`; none for an unknown type."""
        of_type = _type_named(model_type)
        if of_type is None:
            return ()
        return (*self._catalogue.list(of_type), *self._registered[of_type].values())

    def is_builtin(self, family: ModelFamily) -> bool:
        """Whether the family is of the catalogue, and so cannot be unregistered."""
        return self._catalogue.has(family.model_type, family.model_name)

    def base_of(self, family: ModelFamily) -> ModelFamily | None:
        """The family of the catalogue that a registration's model_family names; it lends what is not given."""
        name = getattr(family, "model_family", None)
        if not name or not self._is_registered(family):
            return None
        of_type = family.model_type
        return self._catalogue.find(of_type, name) or self._catalogue.find_folded(of_type, name)

    def template_base_of(self, family: ModelFamily) -> ModelFamily | None:
        """The family of the catalogue that a registration names in place of a chat template."""
        template = getattr(family, "chat_template", None)
        if not template or not self._is_registered(family):
            return None
        return self._catalogue.find(family.model_type, template)

    def _is_registered(self, family: ModelFamily) -> bool:
        return not self._catalogue.has(family.model_type, family.model_name)

    def including(self, family: ModelFamily) -> Registry:
        """A registry of the same catalogue and this family alone, unchecked and without a folder: to try things."""
        other = Registry(catalogue=self._catalogue)
        other._registered[family.model_type][family.model_name] = family
        return other

    def notes_on(self, model_type: str, model: str | bytes | Mapping[str, Any]) -> Registered:
        """What registering would make of a model's JSON, without a look at its files, and without doing it.

        Raises:
            RegistrationRefused: the JSON is wrong.
        """
        family, lifted = _read(model_type, model)
        return Registered(family=family, lifted=(*lifted, *_family_warnings(self._catalogue, family)))

    # -- registering

    def register(self, model_type: str, model: str | bytes | Mapping[str, Any], *, persist: bool) -> Registered:
        """Add a family.

        A language model whose abilities need something of its family (tools, vision) may name a family that is
        not known here: engines take tool parser and architecture from the model's own files. The answer says so.

        Args:
            model_type: one of REGISTRABLE, spelt so.
            model: the family's JSON: text, or what the text would say. Older forms are lifted.
            persist: whether it is kept on disk, and so past the end of the process.
        Raises:
            RegistrationRefused: nothing was changed; the text says why and what to do.
            OSError: it could not be written; nothing was changed.
        """
        if model_type not in REGISTRABLE:
            raise RegistrationRefused(_unsupported(model_type))
        family, lifted = _read(model_type, model)
        warnings = _check_sources(family, model_type)
        warnings += _family_warnings(self._catalogue, family)
        with self._writing:
            self._check_free(family)
            if persist:
                self._write(family)
                self._on_disk.add((model_type, family.model_name))
            self._registered[model_type][family.model_name] = family
        return Registered(family=family, lifted=(*lifted, *warnings))

    def unregister(self, model_type: str, model_name: str) -> bool:
        """Forget a registration, and delete its file. Whether there was one.

        Raises:
            RegistrationRefused: there is no such type, or the model is of the catalogue.
            OSError: its file could not be deleted; it is still registered.
        """
        if model_type not in FAMILIES:
            raise RegistrationRefused(_unsupported(model_type))
        with self._writing:
            if model_name not in self._registered[model_type]:
                if self._catalogue.has(model_type, model_name):
                    raise RegistrationRefused(
                        f"Model {model_name} is built-in and cannot be unregistered. Only registered models can."
                    )
                return False
            if (model_type, model_name) in self._on_disk:
                path = self._path(model_type, model_name)
                if path.exists():
                    path.unlink(missing_ok=True)
                    _sync(path.parent)
                self._on_disk.remove((model_type, model_name))
            del self._registered[model_type][model_name]
        return True

    def _check_free(self, family: ModelFamily) -> None:
        name = family.model_name
        if self._catalogue.has(family.model_type, name):
            raise RegistrationRefused(f"Model name conflicts with existing model {name}. Choose another model_name.")
        if name in self._registered[family.model_type]:
            raise RegistrationRefused(f"Model {name} already registered. Unregister it first, or choose another name.")

    # -- files

    def _path(self, model_type: str, model_name: str) -> Path:
        assert self._folder is not None
        return self._folder / model_type.lower() / f"{model_name}.json"

    def _write(self, family: ModelFamily) -> None:
        """A new file for the family.

        Raises:
            RegistrationRefused: there is a file of that name; it stays as it is.
        """
        if self._folder is None:
            raise RegistrationRefused("There is no folder to keep registrations in. Register it with persist false.")
        path = self._path(family.model_type, family.model_name)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _sync(path.parent.parent)
        text = msgspec.json.format(msgspec.json.encode(encode_family(family)), indent=2) + b"\n"
        handle, partial = tempfile.mkstemp(prefix=".register-", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            _link(partial, path)
        except FileExistsError:
            raise RegistrationRefused(
                f"Model {family.model_name} already registered: there is a file {path.name} of another process, or one "
                "that could not be read. Restart to take it over, or move it away."
            ) from None
        finally:
            Path(partial).unlink(missing_ok=True)
        _sync(path.parent)

    def _load(self, folder: Path) -> None:
        for model_type in REGISTRABLE:
            of_type = folder / model_type.lower()
            try:
                paths = sorted(of_type.glob("*.json"))
                _remove_stale(of_type)
            except OSError as exc:
                self._tell(f"The registrations in {of_type} cannot be read: {exc.strerror or exc}.")
                continue
            for path in paths:
                try:
                    family = self._load_one(model_type, path)
                except (RegistrationRefused, OSError) as exc:
                    self._tell(f"The registration in {path} is skipped: {exc}")
                else:
                    self._registered[model_type][family.model_name] = family
                    self._on_disk.add((model_type, family.model_name))

    def _load_one(self, model_type: str, path: Path) -> ModelFamily:
        family, _ = _read(model_type, path.read_bytes())
        if path.name != f"{family.model_name}.json":
            raise RegistrationRefused(
                f"it holds a model named {family.model_name}. Rename it to {family.model_name}.json."
            )
        self._check_free(family)
        try:
            _check_sources(family, model_type)
        except RegistrationRefused as exc:
            # Its disk may be mounted later.
            self._tell(f"The registration in {path} cannot be launched as it is: {exc}")
        return family

    def _tell(self, problem: str) -> None:
        self.problems.append(problem)
        logger.warning("%s", problem)


# -- checks


def _type_named(model_type: str) -> str | None:
    wanted = model_type.casefold()
    return next((name for name in FAMILIES if name.casefold() == wanted), None)


def _unsupported(model_type: str) -> str:
    if model_type in FAMILIES:
        return (
            f"Unsupported model type: {model_type}. {model_type.capitalize()} models are those of the catalogue; "
            f"models can be registered as {', '.join(REGISTRABLE)}."
        )
    return f"Unsupported model type: {model_type[:100]}. {did_you_mean(model_type, REGISTRABLE, what='Model types')}"


def _read(model_type: str, model: str | bytes | Mapping[str, Any]) -> tuple[ModelFamily, list[str]]:
    """A family from JSON of any known form, and what was read otherwise than written.

    Raises:
        RegistrationRefused: it is damaged or breaks a rule that needs no look at the disk.
    """
    try:
        data, lifted = lift(model_type, object_of(model))
        for refusal in _refusals_by_hand(model_type, data):
            raise refusal
        family = decode_family(model_type, data)
    except DecodeError as exc:
        raise RegistrationRefused(f"The model's JSON is wrong: {exc}") from exc
    family = msgspec.structs.replace(family, is_builtin=False)
    return family, [*_first(lifted), *_first(_unknown_sentences(model_type, data))]


def object_of(model: str | bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that a model's JSON holds.

    Raises:
        DecodeError: it is no JSON, or no object.
    """
    data = parse(model, MAX_JSON_BYTES) if isinstance(model, str | bytes) else model
    check_plain(data)
    if not isinstance(data, Mapping):
        raise DecodeError(f"Expected an object with a model_name, got `{type(data).__name__}` - at `$`")
    return data


def all_refusals(model_type: str, model: str | bytes | Mapping[str, Any]) -> list[str]:
    """Everything for which `Registry.register` could refuse a model's JSON, but for its files and its name being taken.

    Raises:
        DecodeError: it is no JSON, or no object.
    """
    data, _ = lift(model_type, object_of(model))
    by_hand = [str(refusal) for refusal in _refusals_by_hand(model_type, data)]
    is_family_told = any("`model_family`" in one for one in by_hand)
    faults = [one for one in faults_of(model_type, data) if not (is_family_told and "'model_family' is missing" in one)]
    return list(dict.fromkeys([*by_hand, *faults]))


def _refusals_by_hand(model_type: str, data: Mapping[str, Any]) -> Iterator[ValueError]:
    """What the decoder does not know of; in the order in which it is told."""
    yield from _name_refusals(data.get("model_name"))
    if model_type in ("LLM", "audio", "image") and _is_empty(data.get("model_family")):
        yield RegistrationRefused(
            f"You must specify `model_family` when registering custom {model_type} models. " + _family_hint(model_type)
        )
    specs = data.get("model_specs")
    if isinstance(specs, list | tuple) and len(specs) > MAX_SPECS:
        yield DecodeError(f"There are {len(specs)} specs; {MAX_SPECS} at most - at `$.model_specs`")


def _first(sentences: Iterable[str]) -> list[str]:
    """The first of possibly very many."""
    return list(islice(sentences, MAX_SENTENCES))


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _family_hint(model_type: str) -> str:
    if model_type == "LLM":
        return "Name the built-in model that it derives from, or 'other'."
    example = "'whisper', 'ChatTTS'" if model_type == "audio" else "'stable_diffusion', 'ocr'"
    return f"It says what loads the model, such as {example}."


def _name_refusals(name: object) -> Iterator[ValueError]:
    try:
        _check_name(name)
    except (DecodeError, RegistrationRefused) as exc:
        yield exc


def _check_name(name: object) -> None:
    if name is None:
        raise DecodeError("Required key 'model_name' is missing - at `$`")
    if not isinstance(name, str):
        raise DecodeError(f"Expected `str`, got `{type(name).__name__}` - at `$.model_name`")
    shown = name if len(name) <= MAX_NAME_CHARACTERS else name[:MAX_NAME_CHARACTERS] + "..."
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise RegistrationRefused(
            f"Invalid model name {shown!r}. It needs at least one character, and none of + \\ / ? % # & =, white "
            "space or control characters."
        )
    try:
        is_long = len(name) > MAX_NAME_CHARACTERS or len(f"{name}.json".encode()) > MAX_FILE_NAME_BYTES
    except UnicodeEncodeError as exc:
        raise RegistrationRefused(
            f"Invalid model name {shown!r}. It holds half of a surrogate pair, which is no character."
        ) from exc
    if is_long:
        raise RegistrationRefused(
            f"Invalid model name {shown!r}. It is longer than {MAX_NAME_CHARACTERS} characters, or "
            f"{MAX_FILE_NAME_BYTES} bytes as the name of a file."
        )


def _unknown_sentences(model_type: str, data: Mapping[str, Any]) -> Iterator[str]:
    for path, key, known in unknown_keys(model_type, data)[:MAX_UNKNOWN_KEYS]:
        is_kept = path == "$" and model_type in KEEPS_UNKNOWN
        near = nearest(key[:100], known)
        if key == "prompt_style" or (is_kept and not near):
            continue  # told by compat; or a note of the user's, which is theirs to keep
        hint = f" Did you mean {near[0]!r}?" if near else ""
        place = f"`{path}`" if path != "$" else "the model"
        yield f"Key {key[:100]!r} of {place} means nothing here and is {'kept' if is_kept else 'left out'}.{hint}"


def _check_sources(family: ModelFamily, model_type: str) -> list[str]:
    """What is doubtful about where the files are.

    Raises:
        RegistrationRefused: a model_uri is of no use.
    """
    said = []
    specs = family.specs
    if not specs:
        said.append("model_specs is empty: a launch has to give a model_path.")
    for index, spec in enumerate(specs):
        said += check_source(spec, place_of(family, index))
    return said


def place_of(family: ModelFamily, index: int) -> str:
    """What sentences call a spec of the family."""
    return "the model" if isinstance(family, FlatFamily) and not family.model_specs else f"model_specs[{index}]"


def check_source(spec: ModelSpec, place: str) -> list[str]:
    """What is doubtful about where a spec's files are.

    Raises:
        RegistrationRefused: its model_uri is of no use.
    """
    if spec.model_uri is not None:
        return _check_uri(spec, place)
    if not spec.model_id:
        return [f"{place} names no files: neither model_id nor model_uri. A launch has to give a model_path."]
    if spec.model_format == GGUF and not spec.model_file_name_template:
        return [f"{place} has no model_file_name_template: a file with its quantization in its name is taken."]
    return []


def _check_uri(spec: ModelSpec, place: str) -> list[str]:
    uri = spec.model_uri or ""
    shown = uri if len(uri) <= MAX_SHOWN else uri[:MAX_SHOWN] + "..."
    try:
        path = local_path(uri) if uri else None
    except BadUri as exc:
        raise RegistrationRefused(str(exc)) from exc
    if not uri:
        raise RegistrationRefused("Invalid model URI ''. Give an absolute path on the server, or null for none.")
    if path is None:
        return [f"{place} has a model_uri that is no path on the server: it can be registered but not launched."]
    try:
        if not path.exists():
            if glob.has_magic(str(path)) and glob.glob(str(path)):
                return []
            said = f"Invalid model URI {shown}. There is no such file or folder on the server. {_near_path(path)}"
            raise RegistrationRefused(said.rstrip())
        if spec.model_format == GGUF:
            return _check_gguf(spec, path)
        if path.is_file():
            wanted = f"model_format {GGUF!r}" if is_gguf(path.name) else "its folder"
            return [f"{place} has a file as model_uri, but {spec.model_format} models are folders. Give {wanted}."]
    except (OSError, ValueError, re.error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        if isinstance(exc, RegistrationRefused):
            raise
        raise RegistrationRefused(f"Invalid model URI {shown}. It cannot be looked at: {reason}.") from exc
    return []


def _check_gguf(spec: ModelSpec, path: Path) -> list[str]:
    if path.is_file():
        return []
    source = source_of(spec)
    if local.find(source) is None:
        there = sorted(p.name for p in path.glob("*") if is_gguf(p.name))
        holds = f"It has: {', '.join(there[:10])}." if there else "It has no GGUF file."
        raise RegistrationRefused(
            f"Invalid model URI {spec.model_uri}. The folder holds no {' or '.join(source.files)}. {holds} "
            "Give the file itself as model_uri, or mend model_file_name_template and quantization."
        )
    return []


def _near_path(path: Path) -> str:
    try:
        near = nearest(path.name, (p.name for p in path.parent.iterdir()))
    except OSError:
        return ""
    return f"Did you mean {str(path.parent / near[0])!r}?" if near else ""


def _family_warnings(catalogue: Catalogue, family: ModelFamily) -> list[str]:
    if not isinstance(family, LLMFamily):
        return []
    said = []
    base = catalogue.find_folded("LLM", family.model_family or "")
    for ability in ("tools", "vision"):
        if ability in family.model_ability and (base is None or ability not in base.abilities):
            because = "is not a built-in model" if base is None else f"is not known for {ability}"
            said.append(
                f"model_family {family.model_family!r} {because}: whether {ability} "
                "works depends on the model's own files."
            )
    template = family.chat_template
    if template and not _JINJA.search(template) and not catalogue.has("LLM", template):
        said.append("chat_template is neither a Jinja template nor a built-in model's name: it is not used.")
    return said


# -- disk


def _link(partial: str, path: Path) -> None:
    """Give the partial file its final name, unless that is taken.

    Raises:
        FileExistsError: it is.
    """
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError as exc:
        if exc.errno not in _NO_LINKS_HERE:
            raise
        _under_lock(path.parent, lambda: _move_if_free(partial, path))


def _move_if_free(partial: str, path: Path) -> None:
    if path.exists():
        raise FileExistsError(path)
    os.rename(partial, path)


def _under_lock(folder: Path, act: Callable[[], None]) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        act()
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Delete what registrations that were killed left behind."""
    for path in folder.glob(".register-*.partial"):
        try:
            if time.time() - path.stat().st_mtime > STALE_AFTER_S:
                path.unlink(missing_ok=True)
        except OSError:
            continue
