"""Settings: the environment, read once, checked, frozen.

Every variable is `NEURAL_MRI_` and a field's name in capitals. One that is almost a setting's is refused, so that
a typing error never runs with a default; one that resembles none may be a newer release's, and is told of and left
alone. The struct is passed as an argument, never imported.
"""

import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = ("InvalidSettings", "Settings", "load_settings", "unknown", "without_credentials")

PREFIX = "NEURAL_MRI_"

Seconds = Annotated[float, Meta(gt=0)]
Bucket = Annotated[str, Meta(pattern=r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.-]+)*/?)?$")]
Address = Annotated[str, Meta(pattern=r"^(https?://[^/?#\s@]+/?)?$")]

ModelSources = Annotated[str, Meta(pattern=r"^([^=,\s]+=[^=,\s]+(,[^=,\s]+=[^=,\s]+)*)?$")]

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+(?=@)|(?<=nmri_[0-9a-f]{12}_)[\w-]+")

_SLIP = 2
"""Letters by which a typing error differs from what was meant, at most."""

_SECRET = frozenset({"key_pepper"})
"""Settings whose values are shown nowhere."""


def without_credentials(text: str) -> str:
    """The text, with user names and passwords in URLs hidden, and the secrets of API keys."""
    return _CREDENTIALS.sub("***", text)


class InvalidSettings(Exception):
    """The environment names a setting that does not exist, or gives one a value it cannot have."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of all processes."""

    data_dir: Path = Path("~/.neural-mri")
    """Folder of everything the embedded set-up keeps: database, results, models, Valkey's log."""
    database_url: str = ""
    """SQLAlchemy URL; a SQLite file in the data folder where empty."""
    store_url: Bucket = ""
    """`s3://bucket/prefix` for results; the data folder where empty. Credentials and region come from the
    environment as every AWS client reads them (`AWS_*`)."""
    store_endpoint: Address = ""
    """Server of that bucket, `https://host:port`; `AWS_ENDPOINT_URL`, or AWS itself, where empty."""
    redis_url: str = ""
    """Redis or Valkey; the bundled server's socket where empty."""
    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 8642
    """Port the API listens on."""
    allowed_hosts: str = "127.0.0.1,localhost,[::1]"
    """Host headers the API answers to, separated by commas: stops DNS rebinding."""
    trusted_proxies: str = ""
    """Addresses and networks of proxies before the API, `10.0.0.0/8`, separated by commas: of requests from there
    `X-Forwarded-For` says who asks. Nobody's is believed where empty."""
    auth: Literal["off", "keys"] = "off"
    """`keys`: every request needs an API key. `off`: none does, and only this machine is served."""
    key_pepper: str = ""
    """What API keys are hashed under; the data folder's own, made when first needed, where empty."""
    login_seconds: Seconds = 43_200.0
    """How long a session of the viewer lasts."""
    viewer_dir: Path = Path("web/dist")
    """Folder of the built viewer."""
    default_model: str = "smollm2-135m-instruct"
    """Model of a request that names none."""
    pinned_models: str = "smollm2-135m-instruct"
    """Models a worker loads at start and never evicts, separated by commas."""
    model_sources: ModelSources = ""
    """Where models come from that are brought into the store by name: `NAME=SOURCE`, separated by commas."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Floating-point type models are loaded in."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: a GPU where there is one."""
    threads: Annotated[int, Meta(ge=0)] = 0
    """Threads torch may use on the CPU; 0 leaves it to torch."""
    memory_bytes: Annotated[int, Meta(ge=0)] = 0
    """Bytes a worker may use for models and scans; 0: what its device, or its control group, has."""
    spread: Literal["auto", "off"] = "auto"
    """`auto`: a model too large for one GPU is spread over all that the worker sees. `off`: it is refused."""
    load_on_demand: bool = True
    """Whether a scan has its model loaded where no worker holds it; else only `POST /api/model/load` does."""
    model_residence_seconds: Annotated[float, Meta(ge=0)] = 10.0
    """How long a loaded model stays before it may give way to another; at least as long as loading took."""
    model_patience_seconds: Seconds = 60.0
    """How long jobs wait at most before their model takes the place of one in greater demand."""
    model_demand_seconds: Seconds = 20.0
    """Time in which a request's weight in its model's demand falls to 37 % once it has been served."""
    max_tokens: Annotated[int, Meta(ge=1)] = 4096
    """Longest prompt accepted, in tokens, whatever the model's own context."""
    batch_jobs: Annotated[int, Meta(ge=1, le=256)] = 16
    """Jobs of one kind and prompt length that may share a forward pass; 1 runs each alone."""
    batch_tokens: Annotated[int, Meta(ge=1)] = 2048
    """Tokens that may share a forward pass, all its prompts together."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 2_000_000
    """Largest request body accepted."""
    max_batch_bytes: Annotated[int, Meta(ge=1024)] = 64_000_000
    """Largest batch accepted; each of its scans is bounded like a request of its own."""
    max_session_bytes: Annotated[int, Meta(ge=1024)] = 1_000_000_000
    """Largest session file accepted, results included."""
    max_queued_jobs: Annotated[int, Meta(ge=1)] = 10_000
    """Unfinished jobs accepted in all; beyond it requests are answered 429, and lines of batches wait: these
    fill three quarters of it."""
    user_max_jobs: Annotated[int, Meta(ge=0)] = 1000
    """Jobs that one user may have under way where keys are asked for; 0: no limit of their own. Batches are
    accepted all the same, and fill three quarters of it at a time."""
    user_daily_seconds: Annotated[float, Meta(ge=0)] = 0.0
    """Seconds that one user's jobs may compute within 24 hours, where keys are asked for; 0: no limit. Lines of
    batches wait until there are some again."""
    user_requests_a_minute: Annotated[int, Meta(ge=0)] = 30_000
    """Requests that one user may make, where keys are asked for; 0: any number."""
    login_requests_a_minute: Annotated[int, Meta(ge=0)] = 600
    """Logins, and requests with keys that are none, from one address; 0: any number."""
    lease_seconds: Seconds = 5.0
    """How long a claim holds without being renewed."""
    reaper_interval_seconds: Seconds = 0.2
    """How often lost tickets and dead leases are looked for."""
    reaper_hung_seconds: Seconds = 120.0
    """How long the reaper may be about one thing before it is taken for hung, and ends to be started anew."""
    reaper_beat_file: str = ""
    """File whose time of change is until when the reaper is alive, for a probe; none where empty."""
    worker_ready_file: str = ""
    """File that is there while the worker holds its models and takes jobs, for a probe; none where empty."""
    max_attempts: Annotated[int, Meta(ge=1)] = 3
    """Claims a job may lose before it is quarantined."""
    job_deadline_seconds: Seconds = 600.0
    """How long one attempt may run before its worker is killed."""
    queued_seconds: Seconds = 86_400.0
    """How long a job may wait for a worker before it is given up as expired."""
    keep_days: Annotated[int, Meta(ge=0, le=36_500)] = 0
    """Days after its end for which a job is kept, and its result while some job names it; then both are deleted. 0:
    for ever. What sessions keep stays."""
    event_stream_length: Annotated[int, Meta(ge=16)] = 4000
    """Events kept for a job."""
    event_stream_seconds: Seconds = 86_400.0
    """How long a job's events are kept."""
    heartbeat_seconds: Seconds = 15.0
    """Pause between comments on a quiet event stream."""
    worker_metrics_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """Port on which a worker answers Prometheus at `host`; 0: none. The API does at `/metrics`."""
    traces_endpoint: Address = ""
    """Collector that traces are sent to (OTLP over HTTP), `http://host:4318`; none are made where empty."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is logged."""
    log_format: Literal["console", "json"] = "console"
    """`console` for people, `json` for machines."""

    @property
    def batch_forwards(self) -> int:
        """As much work as a pass takes, in plain forwards: some mates read far more than others."""
        return max(1, 3 * self.batch_jobs // 2)

    @property
    def folder(self) -> Path:
        """The data folder, absolute."""
        return self.data_dir.expanduser().resolve()

    @property
    def models_dir(self) -> Path:
        """The model store: a folder of safetensors, config and tokenizer for each model."""
        return self.folder / "models"

    @property
    def store_dir(self) -> Path:
        """The object store's folder."""
        return self.folder / "results"

    @property
    def effective_database_url(self) -> str:
        """`database_url`, or the embedded SQLite file's."""
        return self.database_url or f"sqlite:///{self.folder / 'neural-mri.db'}"

    @property
    def valkey_socket(self) -> Path:
        """Socket of the bundled server. A path of over 107 bytes cannot be one (sun_path)."""
        return self.folder / "valkey.sock"

    @property
    def effective_redis_url(self) -> str:
        """`redis_url`, or the bundled server's."""
        return self.redis_url or f"unix://{self.valkey_socket}"

    @property
    def pinned(self) -> tuple[str, ...]:
        """Names of the models to pin."""
        return tuple(name.strip() for name in self.pinned_models.split(",") if name.strip())

    @property
    def sources(self) -> dict[str, str]:
        """Where models come from, by their names."""
        pairs = (pair.partition("=") for pair in self.model_sources.split(",") if pair)
        return {name: source for name, _, source in pairs}

    @property
    def proxies(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Where the proxies are. Raises `ValueError` that names what is no network."""
        return tuple(
            ip_network(part.strip()) for part in self.trusted_proxies.split(",") if part.strip()
        )

    def __repr__(self) -> str:
        fields = (field.name for field in msgspec.structs.fields(self))
        shown = (
            f"{name}={'***' if name in _SECRET else without_credentials(repr(getattr(self, name)))}"
            for name in fields
        )
        return f"Settings({', '.join(shown)})"

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these settings."""
        names = (field.name for field in msgspec.structs.fields(self))
        return {PREFIX + name.upper(): str(getattr(self, name)) for name in names}


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment. Raises `InvalidSettings` with the variable and what it needs."""
    given = _given(os.environ if environment is None else environment)
    known = _known()
    for name in given.keys() - known:
        if likely := [each for each in sorted(known) if _differ_by_a_slip(name, each)]:
            raise InvalidSettings(
                f"{PREFIX}{name.upper()} is not a setting; {PREFIX}{likely[0].upper()} is"
            )
    try:
        settings = msgspec.convert(
            {name: value for name, value in given.items() if name in known},
            Settings,
            strict=False,
            dec_hook=_path,
        )
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        value = without_credentials(given.get(name, ""))
        raise InvalidSettings(f"{PREFIX}{name.upper()} is {value!r}: {expected}") from error
    try:
        _ = settings.proxies
    except ValueError as error:
        raise InvalidSettings(f"{PREFIX}TRUSTED_PROXIES: {error}") from error
    return settings


def unknown(environment: Mapping[str, str] | None = None) -> list[str]:
    """Variables that are named like settings and are none of this release's."""
    names = _given(os.environ if environment is None else environment).keys() - _known()
    return [PREFIX + name.upper() for name in sorted(names)]


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX)
    }


def _known() -> set[str]:
    return {field.name for field in msgspec.structs.fields(Settings)}


def _differ_by_a_slip(one: str, other: str) -> bool:
    """Whether two changed, lost or added letters at most make one name of the other."""
    if abs(len(one) - len(other)) > _SLIP:
        return False
    before = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        now = [row]
        for column, another in enumerate(other, 1):
            changed = before[column - 1] + (letter != another)
            now.append(min(changed, before[column] + 1, now[-1] + 1))
        before = now
    return before[-1] <= _SLIP


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)
