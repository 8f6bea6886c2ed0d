"""A small residual convolutional net with BatchNorm, for images of 8×8 or larger.

Shape suffixes: B batch, C channels, H height, W width, N classes.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

StageWidth = Annotated[int, Field(ge=4, le=512)]


class ConvNetConfig(BaseModel):
    """Sizes of a ConvNet. Each stage after the first halves the image.

    `channels`, `image_size` and `classes` null: as the data has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    widths: Annotated[tuple[StageWidth, ...], Field(min_length=1, max_length=5)] = (32, 64)
    blocks_per_stage: Annotated[int, Field(ge=1, le=8)] = 1
    channels: Annotated[int, Field(ge=1, le=16)] | None = None
    image_size: Annotated[int, Field(ge=8, le=256)] | None = None
    classes: Annotated[int, Field(ge=2, le=10_000)] | None = None

    @property
    def smallest_image(self) -> int:
        """The side of the smallest square image that still has 2×2 pixels in the last stage."""
        return max(8, 2 ** len(self.widths))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, [B, C, H, W] to [B, width, H/stride, W/stride]."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride=stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        return F.relu(self.norm2(self.conv2(y_BCHW)) + self.shortcut(x_BCHW))


class ConvNet(nn.Module):
    """Images float32 [B, C, H, W] to logits [B, N]."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        if config.channels is None or config.classes is None:
            raise ValueError(
                "ConvNet needs channels and classes: ArchitectureSpec.fitted_config has them from the data"
            )
        width = config.widths[0]
        self.stem = nn.Conv2d(config.channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.ModuleList()
        for index, next_width in enumerate(config.widths):
            blocks = nn.ModuleList()
            for position in range(config.blocks_per_stage):
                halves = index > 0 and position == 0
                blocks.append(ResidualBlock(width, next_width, stride=2 if halves else 1))
                width = next_width
            self.stages.append(blocks)
        self.head = nn.Linear(width, config.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm(self.stem(x_BCHW)))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x_BCHW = block(x_BCHW)
        return self.head(x_BCHW.mean(dim=(2, 3)))
