"""What a foldin.toml may say: one frozen dataclass a table, with the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RECEIVER_PATH = "/mlflow"  # where the receiver takes deliveries


@dataclass(frozen=True)
class RegistryConfig:
    """`[registry]`: where things are kept. Everything defaults to embedded, below `home`."""

    home: str = ".foldin"  # folder for scratch, the content store, caches and the embedded databases
    tracking_uri: str = ""  # MLflow; "" = SQLite in home
    artifact_root: str = ""  # where MLflow keeps files; "" = a folder in home, or the server's own choice
    ledger_url: str = ""  # SQLAlchemy URL; "" = SQLite in home
    openlineage: str = ""  # where OpenLineage events about folds go: http(s)://SERVER, or a file; "" = nowhere
    cache: float = 10.0  # gigabytes; of what is read from S3 over and over
    keep: float = 5.0  # versions before a champion, and newest versions, whose files `foldin gc` leaves
    keep_thin: float = 100.0  # the same, of which it leaves at least all but the serving weights
    lease_seconds: float = 60.0  # a worker that says nothing for so long may be taken over


@dataclass(frozen=True)
class ReceiverConfig:
    """`[receiver]`: where MLflow's webhooks are received (`foldin receive`)."""

    host: str = "127.0.0.1"  # address to listen at
    port: float = 8950.0  # 1 to 65535
    url: str = ""  # where MLflow reaches it; "" = http://HOST:PORT/mlflow

    @property
    def address(self) -> str:
        """Where MLflow's webhooks go."""
        return self.url or f"http://{self.host}:{self.port:.0f}{RECEIVER_PATH}"


@dataclass(frozen=True)
class StackConfig:
    """`[stack]`: the services that `foldin up` keeps running on this machine."""

    mlflow_port: float = 5000.0
    prefect_port: float = 4200.0
    s3_port: float = 9000.0
    s3_command: tuple[str, ...] = ()  # what serves S3 there, with {port} and {folder} in it; () = moto, in memory


@dataclass(frozen=True)
class SearchConfig:
    """`[lines.NAME.search]`: what is tried when the gate rejects an expert, on the rows kept for tuning."""

    when: str = "on-reject"  # never; on-reject; always: also when it passes, for something better
    strengths: tuple[float, ...] = (1.3, 1.6, 0.7, 0.5)  # factors of the strength that the fold would have
    weights: tuple[float, ...] = (0.5,)  # of the expert's change
    energies: tuple[float, ...] = (0.8,)  # opcm only
    methods: tuple[str, ...] = ()  # whose state is a sum as well, with their defaults
    tries: float = 8.0  # at most, the configured fold included
    seconds: float = 1800.0  # no try is begun after that


@dataclass(frozen=True)
class SigningConfig:
    """`[lines.NAME.signing]`: who must have signed what. Files in PEM; needs foldin[signing]."""

    key: str = ""  # private key that the line's versions are signed with
    certificate: str = ""  # of that key, then those between it and the root; "" = the key signs for itself
    versions: tuple[str, ...] = ()  # public keys or roots, one of which must have signed a version; () = none needs it
    experts: tuple[str, ...] = ()  # the same for experts


@dataclass(frozen=True)
class RunnerConfig:
    """`[lines.NAME.runner]`: which machine folds and judges."""

    pool: str = ""  # work pool of Prefect whose workers do; "" = the process that watches
    fallback: str = "never"  # cpu: without a worker of the pool, or without its GPU, on the CPU of who is there
    patience: float = 300.0  # seconds a fold waits for a worker before that


@dataclass(frozen=True)
class AccessConfig:
    """`[lines.NAME.access]`: accounts of the operating system, `anyone@prefect` and `anyone@mlflow`; () = anybody."""

    approve: tuple[str, ...] = ()  # who may approve and reject what waits for a person
    rollback: tuple[str, ...] = ()  # who may move the champion: roll back, promote a replay


@dataclass(frozen=True)
class LineConfig:
    """`[lines.NAME]`: one running model."""

    base: str  # folder of the base checkpoint: config.json, *.safetensors, tokenizer
    experts: tuple[str, ...]  # registered models whose versions are folded
    base_sha256: str = ""  # content digest, or the SHA-256 of the one weight file; "" = whatever base holds
    method: str = "opcm"  # a key of merging.METHODS
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the method, such as energy and strength
    plain: tuple[str, ...] = ()  # patterns of linear weights that are added plainly, never projected
    project: tuple[str, ...] = ()  # patterns of other tensors, such as convolutions, that are projected as (out, rest)
    suites: Mapping[str, str] = field(default_factory=dict)  # task -> folder with suite.json, instead of the expert's
    guards: Mapping[str, str] = field(default_factory=dict)  # name -> folder with suite.json: always measured as well
    gate: Mapping[str, Any] = field(default_factory=dict)  # the fields of evaluation.gate.Rules
    search: SearchConfig = field(default_factory=SearchConfig)  # for a fold that passes, or for a better one
    runner: RunnerConfig = field(default_factory=RunnerConfig)  # which machine folds
    signing: SigningConfig = field(default_factory=SigningConfig)  # whose signatures are asked for
    access: AccessConfig = field(default_factory=AccessConfig)  # who may decide
    evaluation_seconds: float = 3600.0  # measuring one model on one suite may take; more counts as not measured
    approval: str = "never"  # which candidates wait for a person: never, on-reject (soft rejections) or always (all)
    notify: tuple[str, ...] = ()  # notification blocks of Prefect that hear what became of an expert, as TYPE/NAME
    trigger: str = "on-register"  # on-register: watch by interval; nightly: on schedule; manual: only by hand
    interval: float = 60.0  # seconds between two looks at the registry
    schedule: str = "0 2 * * *"  # cron of the nightly fold
    timezone: str = "UTC"  # of the schedule and of blackout
    blackout: tuple[str, ...] = ()  # when nothing is folded by itself, such as "Mon-Fri 08:00-18:00"
    batch: float = 8.0  # experts that the nightly fold takes in one pass, at most
    device: str = "cpu"  # cpu, cuda (the fold on every GPU, the evaluation on the first) or cuda:N
    workers: str = ""  # of the fold: "" = every core or GPU, a number of cores, or a Dask scheduler, tcp://HOST:PORT
    upload_patience: float = 3600.0  # seconds an expert may stay unfinished before it is set aside
