"""Networks that are really trained; their parameters have the shapes of the workloads."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers[:-1]:
            y = F.relu(layer(y))
        return F.relu(self.layers[-1](y) + self.shortcut(x))


def _basic(inputs: int, width: int, stride: int) -> _Block:
    layers = [_conv_norm(inputs, width, 3, stride), _conv_norm(width, width, 3)]
    return _Block(inputs, width, stride, layers)


def _bottleneck(inputs: int, width: int, stride: int) -> _Block:
    outputs = 4 * width
    layers = [_conv_norm(inputs, width, 1), _conv_norm(width, width, 3, stride)]
    return _Block(inputs, outputs, stride, [*layers, _conv_norm(width, outputs, 1)])


def small_image_resnet(widths: Sequence[int], blocks: int, stride: int = 1) -> nn.Module:
    """A ResNet for 10 classes of small colour images, from 4x4 up, with projection shortcuts.

    Args:
        widths: channels of each stage; each but the first halves the image.
        blocks: basic blocks in a stage.
        stride: of the first convolution.
    """
    layers: list[nn.Module] = [_conv_norm(3, widths[0], 3, stride), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for i in range(blocks):
            layers.append(_basic(inputs, width, 2 if stage and i == 0 else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def resnet20() -> nn.Module:
    """He et al. 2016, section 4.2."""
    return small_image_resnet((16, 32, 64), 3)


def _imagenet(block: type | object, expansion: int, depths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = [_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(block(inputs, 64 * 2**stage, 2 if stage and i == 0 else 1))  # type: ignore[operator]
            inputs = expansion * 64 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def resnet18() -> nn.Module:
    """He et al. 2016, table 1."""
    return _imagenet(_basic, 1, (2, 2, 2, 2))


def resnet50() -> nn.Module:
    """He et al. 2016, table 1."""
    return _imagenet(_bottleneck, 4, (3, 4, 6, 3))


MODULES = {"ResNet-20": resnet20, "ResNet-18": resnet18, "ResNet-50": resnet50}
