"""Settings of the service: frozen, validated once, passed in; read from ADVISOR_ variables."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

MIB = 1 << 20


class Settings(BaseSettings):
    """`Settings(data_dir=…, port=…)`; what is not given comes from the environment, then from here."""

    model_config = SettingsConfigDict(env_prefix="ADVISOR_", frozen=True, extra="forbid")

    data_dir: Path = Field(Path("advisor-data"), description="the SQLite file, checkpoints, uploads under way")
    database_url: str | None = Field(None, description="SQLAlchemy URL; null: advisor.sqlite in data_dir")
    host: str = Field("127.0.0.1", description="a loopback address; anything else is refused")
    port: int = Field(8000, ge=0, le=65_535, description="0: any free port")

    json_limit_bytes: int = Field(MIB, ge=1, description="largest JSON body")
    window_limit_bytes: int = Field(256 * MIB, ge=1, description="largest window file")
    cached_windows: int = Field(4, ge=1, le=1_000, description="decoded windows kept in memory")

    lease_s: Seconds = Field(6.0, description="a job whose worker is silent for this long is run again")
    heartbeat_s: Seconds = Field(2.0, description="how often a worker renews its lease")
    poll_s: Seconds = Field(0.2, description="how often a worker looks for work, and a stream for events")
    cancel_grace_s: Seconds = Field(10.0, description="a canceled job that has not stopped by then is killed")
    checkpoint_s: Seconds = Field(2.0, description="seconds of training between checkpoints")
    most_crashes: int = Field(3, ge=1, description="a job whose process died this often has failed")
    shutdown_s: int = Field(5, ge=1, description="how long open requests may take at shutdown")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")

    @property
    def url(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'advisor.sqlite'}"

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.lease_s)

    def job_folder(self, job_id: str) -> Path:
        """Where a job keeps its checkpoints."""
        return self.data_dir / "jobs" / job_id

    def window_folder(self, window_id: str) -> Path:
        """Where a window keeps the training's state at its first step."""
        return self.data_dir / "windows" / window_id

    @property
    def uploads(self) -> Path:
        """Where bodies under way wait."""
        return self.data_dir / "uploads"
