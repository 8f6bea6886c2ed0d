"""ArchitectureSpec: a model of a built-in family, its data and how it is trained.

Validated once, then frozen.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from advisor.errors import InvalidModel
from advisor.zoo import datasets, families
from advisor.zoo.datasets import DATASETS, DataConfig, PythonTextConfig
from advisor.zoo.families import FAMILIES, FamilyConfig
from advisor.zoo.gpt import GPTConfig

# Ours: what one machine trains without special care. Beyond these a submission is refused before anything
# is built.
MAX_PARAMETERS = 50_000_000
MAX_TOKENS_A_STEP = 65_536


class TrainingConfig(BaseModel):
    """How the model is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 0.002
    warmup_steps: Annotated[
        int, Field(ge=0, le=100_000, description="steps over which the rate rises, in a straight line")
    ] = 20
    weight_decay: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd; adamw has its own")] = 0.9
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class ArchitectureSpec(BaseModel):
    """What the service needs to train a model: family, config, data, training.

    `ArchitectureSpec.parse(...)` is the way in for what a user wrote: it raises InvalidModel and
    DataMismatch, each with every fault and its place. The plain constructor raises pydantic's
    ValidationError for the same faults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    config: FamilyConfig = Field(default_factory=GPTConfig, validate_default=False)
    data: DataConfig = Field(default_factory=PythonTextConfig)
    training: TrainingConfig = TrainingConfig()

    @classmethod
    def parse(cls, description: dict[str, Any]) -> ArchitectureSpec:
        """The spec of a plain dict.

        Raises InvalidModel; DataMismatch where the model does not fit its data.
        """
        try:
            return cls.model_validate(description)
        except ValidationError as error:
            for fault in error.errors():
                cause = fault.get("ctx", {}).get("error")
                if isinstance(cause, InvalidModel):
                    raise cause from error
            raise InvalidModel("; ".join(_sentence(fault) for fault in error.errors())) from error

    @model_validator(mode="before")
    @classmethod
    def _family_decides(cls, description: Any) -> Any:
        if not isinstance(description, dict):
            return description
        family, data = description.get("family"), description.get("data")
        if not isinstance(family, str) or family not in FAMILIES:
            raise InvalidModel(f"family {family!r} is not one of: {', '.join(FAMILIES)}")
        filled = {**description, "config": description.get("config") or {}, "data": data or {}}
        if isinstance(filled["data"], dict):
            filled["data"] = {"set": FAMILIES[family].default_data, **filled["data"]}
        return filled

    @field_validator("config", mode="before")
    @classmethod
    def _config_of_family(cls, config: Any, info: Any) -> FamilyConfig:
        expected = FAMILIES[info.data["family"]].config
        try:
            return expected.model_validate(config)
        except ValidationError as error:
            raise InvalidModel("; ".join(_sentence(fault, "config") for fault in error.errors())) from error

    @field_validator("data", mode="before")
    @classmethod
    def _config_of_data(cls, data: Any) -> DataConfig:
        name = data.get("set") if isinstance(data, dict) else getattr(data, "set", data)
        if not isinstance(name, str) or name not in DATASETS:
            raise InvalidModel(f"data.set {name!r} is not one of: {', '.join(DATASETS)}")
        try:
            return DATASETS[name].model_validate(data)
        except ValidationError as error:
            raise InvalidModel("; ".join(_sentence(fault, "data") for fault in error.errors())) from error

    @model_validator(mode="after")
    def _fits(self) -> ArchitectureSpec:
        parameters = families.parameter_count(self.family, self.fitted_config)  # raises DataMismatch
        if parameters > MAX_PARAMETERS:
            raise InvalidModel(
                f"the model has {parameters:,} parameters and the limit is {MAX_PARAMETERS:,}: "
                "lower config.width, config.widths or config.layers"
            )
        tokens = self.training.batch_size * (self.length or 1)
        if tokens > MAX_TOKENS_A_STEP:
            raise InvalidModel(
                f"a batch of {self.training.batch_size} × {self.length} tokens exceeds "
                f"{MAX_TOKENS_A_STEP:,}: lower training.batch_size or data.length"
            )
        datasets.require(self.data)
        return self

    @property
    def fitted_config(self) -> FamilyConfig:
        """The config with all that the data decides filled in. Raises DataMismatch."""
        return FAMILIES[self.family].fit(self.config, self.data)

    @property
    def length(self) -> int | None:
        """Tokens a sequence; None for images."""
        if isinstance(self.config, GPTConfig) and isinstance(self.data, PythonTextConfig):
            return self.data.length or self.config.context
        return None

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return families.parameter_count(self.family, self.fitted_config)

    def build(self) -> nn.Module:
        """A new model, its weights drawn from torch's global generator."""
        return families.build(self.family, self.fitted_config)

    def load_data(self) -> datasets.TextData | datasets.ImageData:
        """The data set, in memory. Raises InvalidModel where this machine lacks what it is made of."""
        return datasets.load(self.data, self.length)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `parse` reads back to an equal spec."""
        return self.model_dump(mode="json")


def _sentence(fault: Any, *prefix: str) -> str:
    """One fault of pydantic's as `config.width: Input should be ... (got 7)`."""
    place = ".".join([*prefix, *(str(part) for part in fault["loc"])])
    got = "" if fault["type"] in ("missing", "value_error", "extra_forbidden") else f" (got {fault['input']!r})"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "no such setting"
    return f"{place}: {message}{got}" if place else f"{message}{got}"
