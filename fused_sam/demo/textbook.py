"""Sharpness-Aware Minimization as everybody writes it: a Python loop over the parameters.

It is here to be compared with. Use :class:`fused_sam.FusedSAM`, whose docs tell what goes wrong in
this one: gradients that are missing or not finite, checkpoints, gradient scaling, closures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class TextbookSAM(Optimizer):
    """SAM (Foret et al., ICLR 2021, algorithm 1), parameter by parameter.

    Args:
        params: the parameters.
        base_optimizer: the class that steps.
        rho: radius of the neighbourhood.
        **base_kwargs: options of the base optimizer.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, **base_kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb to w + rho * g / ||g||, and keep w."""
        norm = self._grad_norm()
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and let the base optimizer step with the gradient found above."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        """The base optimizer's step."""
        return self.base_optimizer.step(closure)

    def _grad_norm(self) -> Tensor:
        norms: list[Tensor] = [
            p.grad.norm(p=2) for group in self.param_groups for p in group["params"]
        ]
        norm: Tensor = torch.stack(norms).norm(p=2)
        return norm
