"""The settings: file < environment < flags, decoded once into one frozen Struct."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from engines.base import EngineSettings
from gateway.addresses import is_loopback
from gateway.amounts import bytes_of, bytes_or_share
from gateway.calls import ENDPOINT_VARIABLE, KEY_VARIABLE
from gateway.errors import SettingsError
from gateway.launch import LaunchRequest, Seconds, Size
from registry.decode import DecodeError, Secret, decode, did_you_mean
from registry.hubs import HUBS
from registry.hubs.choose import TRUE

ENV_PREFIX = "HOSTLER_"
XINFERENCE_HUB_VARIABLE = "XINFERENCE_MODEL_SRC"
XINFERENCE_LAUNCHERS_VARIABLE = "XINFERENCE_FLEXIBLE_LAUNCHERS"
XINFERENCE_ENVIRONMENTS_VARIABLE = "XINFERENCE_ENABLE_VIRTUAL_ENV"
XINFERENCE_WHEELS_VARIABLE = "XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS"
# ${NAME}, ${NAME:-default}, ${file:/path}; $${...} stands for itself.
REFERENCE = re.compile(r"(?P<escape>\$)?\$\{(?P<inner>[^}]*)(?P<end>\})?")
VARIABLE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models that are not loaded all at once."""

    max_loaded: Annotated[int, Meta(ge=1, description="how many of its models may be loaded at once")] = 1
    exclusive: Annotated[bool, Meta(description="while one of them is loaded, no model outside the group is")] = False


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a site can set. Each is also an environment variable: HOSTLER_ and the name in capitals."""

    host: Annotated[str, Meta(description="address to listen on; beyond loopback it needs api_keys")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0: any free one")] = 9997
    home: Annotated[str, Meta(description="folder of launches, logs and fetched files")] = "~/.hostler"
    cache: Annotated[str, Meta(description="folder of fetched files, if not in `home`")] | None = None
    api_keys: Annotated[tuple[Secret, ...], Meta(description="who sends one of these may do everything")] = ()
    api_keys_file: Annotated[str, Meta(description="a file with one key a line, added to api_keys")] | None = None
    allowed_origins: Annotated[tuple[str, ...], Meta(description="web pages of these origins may call; '*': all")] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(description="without api_keys: names, beside `host`, that the gateway is called by; '*': all"),
    ] = ()
    max_body_bytes: Annotated[int, Meta(ge=1024, description="a larger request is refused with 413")] = 64 * 2**20
    door: Annotated[
        Literal["auto", "plain"],
        Meta(description="auto: requests that need no more than a look take a short way; plain: none does"),
    ] = "auto"
    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"
    access_log: Annotated[bool, Meta(description="one line a request")] = True
    keepalive_interval_s: Annotated[
        Seconds, Meta(description="between the SSE comments that a waiting stream gets")
    ] = 5.0
    drain_timeout_s: Annotated[
        float,
        Meta(ge=0, description="how long requests in flight may go on when a model or the gateway stops"),
    ] = 30.0
    restart_drain_s: Annotated[
        float,
        Meta(ge=0, description="how long requests in flight may go on in a gateway that another one has taken over"),
    ] = 6 * 3600.0
    on_exit: (
        Annotated[
            Literal["stop", "keep"],
            Meta(description="what becomes of engines when the gateway is stopped; else stop in a terminal, or keep"),
        ]
        | None
    ) = None
    orphan_timeout_s: Annotated[Seconds, Meta(description="engines whose gateway is gone for so long are ended")] = (
        120.0
    )
    max_loaded: Annotated[int, Meta(ge=1, description="how many models may be loaded at once")] | None = None
    groups: Annotated[dict[str, Group], Meta(description="groups that models may belong to, by name")] = {}
    ram_limit: (
        Annotated[Size, Meta(description="of all engines together, such as 48GiB; else what is there")] | None
    ) = None
    ram_headroom: (
        Annotated[Size, Meta(description="memory of the machine that is left free; else a tenth, up to 1GiB")] | None
    ) = None
    gpu_headroom: Annotated[Size, Meta(description="memory of each GPU that is left free")] = "512MiB"
    sleep_memory: Annotated[
        Size,
        Meta(
            description="memory of the machine that models may take to sleep in, as a size or a share such as 25%; 0: "
            "none keeps its weights there"
        ),
    ] = "25%"
    min_residency_s: Annotated[
        float, Meta(ge=0, description="a model that was just loaded makes no room for another for so long")
    ] = 3.0
    max_wait_s: Annotated[
        Seconds,
        Meta(description="who has waited for room so long gets it once busy models have answered what they have"),
    ] = 60.0
    queue_limit: Annotated[int, Meta(ge=0, description="requests that may wait for one model; more get 429")] = 1000
    watch_settings: Annotated[bool, Meta(description="take up a change of the settings file as it is saved")] = True
    restart_limit: Annotated[int, Meta(ge=1, description="failures in a row until a model counts as failed")] = 5
    download_stall_s: Annotated[Seconds, Meta(description="a download without a byte for so long is started anew")] = (
        120.0
    )
    probe_interval_s: Annotated[
        Seconds, Meta(description="between two looks at whether a ready engine still answers")
    ] = 10.0
    probe_failures: Annotated[
        int, Meta(ge=1, description="looks in a row without an answer until an engine counts as hung and is restarted")
    ] = 3
    flexible_launchers: Annotated[
        tuple[str, ...], Meta(description="launchers of flexible models that may run, by their exact dotted names")
    ] = ()
    allow_command_launches: Annotated[
        bool,
        Meta(description="whether launches over the API may name a command line, or variables such as LD_PRELOAD"),
    ] = False
    preferred_hubs: Annotated[
        tuple[str, ...], Meta(description="hubs to take files from where several have them, best first")
    ] = ()
    catalogue_files: Annotated[
        tuple[str, ...],
        Meta(description="catalogues of the site, over the built-in one; in its form; paths, or http(s) URLs"),
    ] = ()
    model_roots: Annotated[
        tuple[str, ...], Meta(description="folders of models, beside the cache, that registrations may be drafted from")
    ] = ()
    model_environments: Annotated[
        bool, Meta(description="give models the Python environments that they ask for, unless a launch says otherwise")
    ] = True
    wheel_folders: Annotated[
        tuple[str, ...], Meta(description="folders of wheels for environments; else `wheels` in `home`")
    ] = ()
    environment_builder: Annotated[
        Literal["auto", "pip", "uv"], Meta(description="what installs packages; auto: uv where it is found")
    ] = "auto"
    engines: Annotated[dict[str, EngineSettings], Meta(description="settings of engines, by engine name")] = {}
    models: Annotated[dict[str, LaunchRequest], Meta(description="models to serve, by uid")] = {}

    def __post_init__(self) -> None:
        """Raises ValueError for a text that is no size, and for a group that there is not."""
        for field in ("ram_limit", "ram_headroom", "gpu_headroom"):
            if (size := getattr(self, field)) is not None:
                try:
                    bytes_of(size)
                except ValueError as exc:
                    raise ValueError(f"`{field}`: {exc}") from exc
        try:
            bytes_or_share(self.sleep_memory, 0)
        except ValueError as exc:
            raise ValueError(f"`sleep_memory`: {exc}") from exc
        for uid, request in self.models.items():
            if request.group is not None and request.group not in self.groups:
                raise ValueError(f"`models.{uid}`: there is no group {request.group!r}. Add it to `groups`")

    @property
    def home_path(self) -> Path:
        """The data folder, absolute."""
        return Path(self.home).expanduser().absolute()

    @property
    def cache_path(self) -> Path:
        """Where fetched files are kept, absolute."""
        return Path(self.cache).expanduser().absolute() if self.cache else self.home_path / "cache"

    @property
    def environments_path(self) -> Path:
        """Where Python environments of engines and models are kept, absolute."""
        return self.home_path / "environments"

    @property
    def wheel_paths(self) -> tuple[Path, ...]:
        """The folders of wheels, absolute."""
        folders = tuple(Path(folder).expanduser().absolute() for folder in self.wheel_folders)
        return folders or (self.home_path / "wheels",)


def load(file: str | None, flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from all three places.

    Args:
        file: path of a YAML, TOML or JSON file, by its ending; None for none.
        flags: what the command line says; None values are left out.
    Raises:
        SettingsError: naming the key's path, or the file, and what to do.
    """
    data = parse(Path(file)) if file else {}
    data |= _from_environment(environment)
    data |= {name: value for name, value in flags.items() if value is not None}
    try:
        settings = decode(resolve(data, environment), Settings, strict=False)
    except DecodeError as exc:
        raise SettingsError(f"{file or 'The settings'}: {exc}") from exc
    except RecursionError as exc:
        raise SettingsError(f"{file or 'The settings'}: a value holds itself, by an anchor and its alias.") from exc
    for field in ("home", "cache", "api_keys_file"):
        _check_folder_of_user(field, getattr(settings, field))
    for folder in settings.wheel_folders:
        _check_folder_of_user("wheel_folders", folder)
    if settings.api_keys_file:
        keys = _keys_in(Path(settings.api_keys_file).expanduser())
        settings = msgspec.structs.replace(settings, api_keys=settings.api_keys + keys)
    if (hub := environment.get(XINFERENCE_HUB_VARIABLE)) and not settings.preferred_hubs and hub != "auto":
        settings = msgspec.structs.replace(settings, preferred_hubs=(hub,))
    if launchers := environment.get(XINFERENCE_LAUNCHERS_VARIABLE):
        named = tuple(name.strip() for name in launchers.split(",") if name.strip())
        settings = msgspec.structs.replace(settings, flexible_launchers=settings.flexible_launchers + named)
    if "model_environments" not in data and (says := environment.get(XINFERENCE_ENVIRONMENTS_VARIABLE)):
        settings = msgspec.structs.replace(settings, model_environments=says.lower() in TRUE)
    if (roots := environment.get(XINFERENCE_WHEELS_VARIABLE)) and not settings.wheel_folders:
        folders = tuple(root.strip() for root in roots.replace(",", os.pathsep).split(os.pathsep) if root.strip())
        settings = msgspec.structs.replace(settings, wheel_folders=folders)
    for hub in settings.preferred_hubs:
        if hub not in HUBS:
            raise SettingsError(f"$.preferred_hubs: there is no hub {hub!r}. {did_you_mean(hub, HUBS)}")
    if key := environment.get(KEY_VARIABLE):
        settings = msgspec.structs.replace(settings, api_keys=(*settings.api_keys, Secret(key)))
    if not all(settings.api_keys):
        raise SettingsError("$.api_keys: an empty key would let everybody in. Remove it, or fill it in.")
    return settings


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the settings of a gateway came from at its start, so that they can be read again."""

    file: Path | None = None
    flags: Mapping[str, Any] = {}
    insecure: bool = False
    digest_at_start: str | None = None

    @classmethod
    def of(cls, file: str | None, flags: Mapping[str, Any], *, insecure: bool) -> Source:
        """Before they are read, so that a later change of the file is seen as one."""
        path = None if file is None else Path(file).absolute()
        return cls(file=path, flags=flags, insecure=insecure, digest_at_start=digest_of(path) if path else None)

    def read(self) -> Settings:
        """The settings as they are now.

        Raises:
            SettingsError: they are wrong, or would let strangers in.
        """
        settings = load(None if self.file is None else str(self.file), self.flags)
        check_exposure(settings, insecure=self.insecure)
        return settings

    def digest(self) -> str | None:
        """Of the file as it is now; None if there is none, or it cannot be read."""
        return None if self.file is None else digest_of(self.file)


NOWHERE = Source()


def digest_of(file: Path) -> str | None:
    """By which two files are known to say the same; None if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def check_exposure(settings: Settings, *, insecure: bool) -> None:
    """Raises SettingsError if strangers could reach the gateway and no key stops them."""
    if settings.api_keys or insecure or is_loopback(settings.host):
        return
    raise SettingsError(
        f"Listening on {settings.host} lets other machines in, and there is no API key. Set `api_keys` "
        "(or HOSTLER_API_KEYS, or `api_keys_file`), listen on 127.0.0.1, or say --insecure if you mean it."
    )


def parse(path: Path) -> dict[str, Any]:
    """What a settings file says, its references as they stand there.

    Raises:
        SettingsError: it cannot be read, or is not what its ending says.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"The settings file {path} cannot be read: {exc}") from exc
    try:
        match path.suffix:
            case ".toml":
                import tomllib

                data = tomllib.loads(text)
            case ".json":
                data = json.loads(text)
            case ".yaml" | ".yml":
                data = _parse_yaml(text)
            case _:
                raise SettingsError(f"{path}: a settings file ends in .yaml, .yml, .toml or .json.")
    except ValueError as exc:
        kind = path.suffix[1:].upper().replace("YML", "YAML")
        raise SettingsError(f"{path} is not valid {kind}: {exc}") from exc
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds {type(data).__name__}, not keys with values.")
    data.pop("$schema", None)  # a word to editors
    return data


def _check_spelling(variable: str, names: Mapping[str, str]) -> None:
    from difflib import get_close_matches

    if near := get_close_matches(variable, names, 1, 0.85):
        raise SettingsError(f"The environment has {variable}, which is no setting. Did you mean {near[0]}?")


def _parse_yaml(text: str) -> Any:
    from gateway.yaml_text import parse

    return parse(text)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """HOSTLER_PORT=... and so on; what is not a plain value is written as YAML."""
    types = get_type_hints(Settings)
    names = {ENV_PREFIX + field.upper(): field for field in types}
    data: dict[str, Any] = {}
    for variable, text in environment.items():
        if not text:
            continue  # empty is how many tools say that it is not set
        if variable not in names:
            if variable in (KEY_VARIABLE, ENDPOINT_VARIABLE):
                continue
            if variable.startswith(ENV_PREFIX):
                _check_spelling(variable, names)
            continue
        field = names[variable]
        if types[field] in (tuple[Secret, ...], tuple[str, ...]) and not text.lstrip().startswith("["):
            data[field] = [part.strip() for part in text.split(",") if part.strip()]
        elif types[field] in (str, str | None):
            data[field] = text
        else:
            try:
                data[field] = _parse_yaml(text)
            except ValueError as exc:
                raise SettingsError(f"{variable} is not valid YAML: {exc}") from exc
    return data


def resolve(data: Any, environment: Mapping[str, str] = os.environ, path: str = "$") -> Any:
    """Put in what ${...} refers to, everywhere.

    Raises:
        SettingsError: a reference is wrong, or there is nothing where it points.
    """
    if isinstance(data, dict):
        return {key: resolve(value, environment, f"{path}.{key}") for key, value in data.items()}
    if isinstance(data, list):
        return [resolve(value, environment, f"{path}[{index}]") for index, value in enumerate(data)]
    if not isinstance(data, str):
        return data

    def put_in(match: re.Match[str]) -> str:
        if match["escape"]:
            return match[0][1:]
        inner = match["inner"]
        if match["end"] and inner.startswith("file:"):
            return _text_of(inner.removeprefix("file:"), f"{match[0]} at `{path}`").strip()
        variable = VARIABLE.fullmatch(inner)
        if not match["end"] or variable is None:
            raise SettingsError(
                f"`{path}` holds {match[0]!r}, which is no reference: write ${{NAME}}, ${{NAME:-default}} or "
                "${file:/path}, or $${ for the characters themselves."
            )
        value = environment.get(variable["name"])
        if not value and variable["default"] is not None:  # as in a shell
            value = variable["default"]
        if value is None:
            raise SettingsError(
                f"{match[0]} at `{path}` refers to an environment variable that is not set. Set it, or write "
                f"${{{inner}:-a default}}."
            )
        return value

    return REFERENCE.sub(put_in, data)


def escaped(data: Any) -> Any:
    """Data that `resolve` gives back as it was."""
    if isinstance(data, dict):
        return {key: escaped(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [escaped(value) for value in data]
    return data.replace("${", "$${") if isinstance(data, str) else data


def _text_of(path: str, what: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as exc:
        raise SettingsError(f"{what} cannot be read: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"{what} cannot be read: it is not text in UTF-8.") from exc
    except (RuntimeError, ValueError) as exc:  # ~nobody, or a NUL in the path
        raise SettingsError(f"{what} cannot be read: {exc}") from exc


def _check_folder_of_user(field: str, path: str | None) -> None:
    try:
        Path(path or ".").expanduser()
    except RuntimeError as exc:
        raise SettingsError(f"$.{field}: {path!r} names the home folder of a user that does not exist.") from exc


def _keys_in(path: Path) -> tuple[Secret, ...]:
    lines = _text_of(str(path), f"`api_keys_file` {path}").splitlines()
    keys = tuple(Secret(line.strip()) for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise SettingsError(f"`api_keys_file` {path} holds no key: write one a line.")
    return keys
