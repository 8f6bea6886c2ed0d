"""Convolutions, transposed ones included, as products of an input and a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from probes.operation import Operation, argument

_BIAS = (2, "bias")


@dataclass(frozen=True)
class Convolution(Operation):
    """`conv1d` to `conv_transpose3d`, `convolution` (which is told whether it is transposed), and `conv_tbc`."""

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        """Without the bias."""
        changed, keywords = self.replace(args, kwargs, operands)
        bias = argument(args, kwargs, *_BIAS)
        none = bias.new_zeros(bias.shape) if self.name == "conv_tbc" and bias is not None else None  # it must have one
        if len(changed) > _BIAS[0]:
            changed = (*changed[: _BIAS[0]], none, *changed[_BIAS[0] + 1 :])
        elif _BIAS[1] in keywords:
            keywords = {**keywords, _BIAS[1]: none}
        result: Tensor = function(*changed, **keywords)
        return result

    def flops(self, operands: Sequence[Tensor], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Each element of the smaller side meets each weight of its channel.

        With groups this is a group's share. FlopCounterMode gives the weight gradient `groups` times that (2.13).
        """
        first, second = operands
        if self.name == "conv_tbc":  # the weight is [kernel, in, out]
            return 2.0 * result.numel() * second.numel() / max(second.shape[2], 1)
        transposed = "transpose" in self.name or (
            self.name == "convolution" and argument(args, kwargs, 6, "transposed")
        )
        return 2.0 * (first if transposed else result).numel() * second.numel() / max(second.shape[0], 1)
