"""What a ``torch.amp.GradScaler`` does to the optimizer, and what that says of the gradients."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import Tensor


class ScalerFacts:
    """What a GradScaler has handed over for this step, and when it has unscaled the gradients.

    Attributes:
        handed: ``grad_scale`` and ``found_inf``, while ``scaler.step`` runs.
        inverse: (1,), what ``unscale_`` has multiplied the gradients by after the first step.
    """

    def __init__(self) -> None:
        self.handed: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """A step is over."""
        self._unscaled_at_w = self._unscaled_away = False
        self.inverse: Tensor | None = None

    def note(self, frame: FrameType, between: bool) -> bool:
        """Somebody reads the parameter groups: if it is ``unscale_``, keep in mind when.

        Args:
            frame: the reader's.
            between: whether a step is half done.

        Returns:
            Whether it is a GradScaler, which is about to look at the gradients.
        """
        code, caller = frame.f_code, frame.f_back
        if code.co_name != "_unscale_grads_" or caller is None:
            return False
        # Its other caller only looks for infinite gradients.
        if caller.f_code.co_name == "unscale_":
            if between:
                self._unscaled_away = True
                self.inverse = frame.f_locals.get("inv_scale")
            else:
                self._unscaled_at_w = True
        return True

    def check_closure(self) -> None:
        """Raise if the gradients of a closure would be scaled by a factor that is not known."""
        if "found_inf" in self.handed and self.handed.get("grad_scale") is None:
            raise RuntimeError(
                "scaler.step(optimizer, closure) after scaler.unscale_(optimizer): the closure's "
                "gradients would still be scaled, by a factor unknown to the optimizer; leave it "
                "out (to clip, pass max_grad_norm=... to FusedSAM)"
            )

    def check_descent(self) -> None:
        """Raise if a second pass's gradients are scaled, and the scaler takes them for unscaled.

        It does so once ``unscale_`` was called, and between two ``update()`` that can be once.
        """
        if self.handed.get("grad_scale") is not None or self._unscaled_away:
            return
        if "found_inf" in self.handed or self._unscaled_at_w:
            raise RuntimeError(
                "scaler.unscale_(optimizer) was called before first_step(), so the gradients of "
                "the second pass are still scaled and the scaler takes them for unscaled: leave it "
                "out, because the climb does not depend on the scale. After the second backward it "
                "is fine; or pass max_grad_norm=... to FusedSAM. restore() goes back to w"
            )

    def check_blend(self, blend: str) -> None:
        """Raise if the gradients at w + epsilon are unscaled and those that are kept may not be."""
        if self._unscaled_away:
            raise RuntimeError(
                f"scaler.unscale_(optimizer) was called after first_step(), and blend={blend!r} "
                f"needs the gradients of both passes at one scale: leave it out (to clip, pass "
                f"max_grad_norm=... to FusedSAM). restore() goes back to w"
            )


class Handed:
    """An attribute that a GradScaler sets for a step; a proxy of the optimizer shares it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        try:
            return optimizer._facts.scaler.handed[self._name]
        except KeyError:
            raise AttributeError(f"no GradScaler has set {self._name!r}") from None

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer._facts.scaler.handed[self._name] = value

    def __delete__(self, optimizer: Any) -> None:
        del optimizer._facts.scaler.handed[self._name]
