"""What is stepped: the parameter shapes of published models, and sweeps.

The shapes follow the models' published definitions; ``WORKLOADS`` asserts the parameter counts
that everybody quotes when it is looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A list of parameter shapes, in the order of ``model.parameters()``."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        """How many numbers that is."""
        return sum(map(_product, self.shapes))


def _product(shape: Shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# ------------------------------------------------------------------------------- published models


def _conv(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _basic_block(inputs: int, width: int, stride: int) -> list[Shape]:
    shapes = _conv(inputs, width, 3) + _norm(width) + _conv(width, width, 3) + _norm(width)
    if stride != 1 or inputs != width:
        shapes += _conv(inputs, width, 1) + _norm(width)
    return shapes


def _bottleneck(inputs: int, width: int, stride: int) -> list[Shape]:
    outputs = 4 * width
    shapes = _conv(inputs, width, 1) + _norm(width) + _conv(width, width, 3) + _norm(width)
    shapes += _conv(width, outputs, 1) + _norm(outputs)
    if stride != 1 or inputs != outputs:
        shapes += _conv(inputs, outputs, 1) + _norm(outputs)
    return shapes


def resnet20() -> list[Shape]:
    """He et al. 2016, section 4.2, for CIFAR-10, with projection shortcuts."""
    shapes, inputs = _conv(3, 16, 3) + _norm(16), 16
    for width, first_stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(3):
            shapes += _basic_block(inputs, width, first_stride if block == 0 else 1)
            inputs = width
    return shapes + _linear(64, 10)


def _imagenet_resnet(
    block: Callable[[int, int, int], list[Shape]], expansion: int, depths: Sequence[int]
) -> list[Shape]:
    shapes, inputs = _conv(3, 64, 7) + _norm(64), 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for i in range(depth):
            shapes += block(inputs, width, 2 if stage and i == 0 else 1)
            inputs = expansion * width
    return shapes + _linear(inputs, 1000)


def resnet18() -> list[Shape]:
    """He et al. 2016, table 1, for ImageNet."""
    return _imagenet_resnet(_basic_block, 1, (2, 2, 2, 2))


def resnet50() -> list[Shape]:
    """He et al. 2016, table 1, for ImageNet."""
    return _imagenet_resnet(_bottleneck, 4, (3, 4, 6, 3))


def wrn_28_10() -> list[Shape]:
    """Zagoruyko & Komodakis 2016, for CIFAR-10: pre-activation blocks, 16-160-320-640."""
    shapes, inputs = _conv(3, 16, 3), 16
    for width in (160, 320, 640):
        for _ in range(4):
            shapes += _norm(inputs) + _conv(inputs, width, 3)
            shapes += _norm(width) + _conv(width, width, 3)
            if inputs != width:
                shapes += _conv(inputs, width, 1)
            inputs = width
    return shapes + _norm(640) + _linear(640, 10)


def vit_b_16() -> list[Shape]:
    """Dosovitskiy et al. 2021, table 1, 224 pixels, ImageNet-1k head."""
    width, tokens = 768, 14 * 14 + 1
    shapes: list[Shape] = [(1, 1, width), (1, tokens, width), *_conv(3, width, 16), (width,)]
    for _ in range(12):
        shapes += _norm(width) + _linear(width, 3 * width) + _linear(width, width)
        shapes += _norm(width) + _linear(width, 4 * width) + _linear(4 * width, width)
    return shapes + _norm(width) + _linear(width, 1000)


def gpt2_small() -> list[Shape]:
    """Radford et al. 2019, the smallest; the head is tied to the token embedding."""
    width = 768
    shapes: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(12):
        shapes += [*_norm(width), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [*_norm(width), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return shapes + _norm(width)


_PUBLISHED = {
    # name: (shapes, tensors, parameters)
    "ResNet-20": (resnet20, 65, 272_474),
    "ResNet-18": (resnet18, 62, 11_689_512),
    "ResNet-50": (resnet50, 161, 25_557_032),
    "WRN-28-10": (wrn_28_10, 80, 36_479_194),
    "ViT-B/16": (vit_b_16, 152, 86_567_656),
    "GPT-2-small": (gpt2_small, 148, 124_439_808),
}

MODELS = tuple(_PUBLISHED)


def model(name: str) -> Workload:
    """One of ``MODELS`` by its name; asserts the published counts."""
    shapes, tensors, numel = _PUBLISHED[name]
    workload = Workload(name, tuple(shapes()))
    found = len(workload.shapes), workload.numel
    assert found == (tensors, numel), f"{name}: {found}, published {(tensors, numel)}"
    return workload


# ------------------------------------------------------------------------------------------ sweeps


def flat(numel: int) -> Workload:
    """One parameter of ``numel`` numbers."""
    return Workload(f"1 x {numel}", ((numel,),))


def split(numel: int, tensors: int) -> Workload:
    """``numel`` numbers in ``tensors`` parameters of equal size, but for the last."""
    each = numel // tensors
    sizes = [each] * (tensors - 1) + [numel - each * (tensors - 1)]
    return Workload(f"{tensors} of {numel}", tuple((size,) for size in sizes))
