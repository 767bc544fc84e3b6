"""What a backend is: all take the same buckets and follow the same rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..layout import Bucket
from ..rules import Rule

Groups = Sequence[dict[str, Any]]
Gradients = Sequence[Tensor | None]
"""A bucket's gradients, one for each slot, as ``Bucket.gradients`` returns them."""


class Backend(Protocol):
    """Three operations on a bucket, and the way back. None of them waits for the device."""

    name: str

    def sq_norm(self, bucket: Bucket, grads: Gradients, groups: Groups | None) -> Tensor:
        """Partial sums of the squared norm of the gradients.

        Args:
            bucket: whose gradients.
            grads: the gradients; None counts as zero.
            groups: with groups, of ``T * g``, T = ``|w| + eta`` where a group is adaptive and 1
                elsewhere (ASAM); with None, of ``g``.

        Returns:
            (k,), k >= 1, in the bucket's compute dtype; their sum is the squared norm.
        """

    def perturb_(self, bucket: Bucket, grads: Gradients, groups: Groups, sq_norm: Tensor) -> None:
        """Save w, then climb: ``w += rho * T**2 * g / norm`` (Foret et al. 2021, eq. 2).

        Touches the slots that have a gradient. If the norm is zero or not finite nothing moves;
        w is saved all the same. A group with ``maximize`` moves against its gradient.

        Args:
            bucket: ``bucket.saved`` is written, and the weights in place.
            grads: as for ``sq_norm``.
            groups: rho, adaptive, eta and maximize of each row.
            sq_norm: (k,), on the bucket's device; the sum is the squared norm over all buckets.
        """

    def update_(
        self,
        bucket: Bucket,
        grads: Gradients,
        groups: Groups,
        rule: Rule,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Return the perturbed slots to w, and step those that have a gradient by the rule.

        A slot without a gradient is only restored. With lr 0 the weights are the saved bits.

        Args:
            bucket: weights and states, in place.
            grads: as for ``sq_norm``; may be overwritten.
            groups: the hyperparameters of each row.
            rule: the base optimizer's rule.
            grad_scale: (), compute dtype, on the bucket's device: gradients are divided by it.
            found_inf: (), float32, on the bucket's device: if it is not 0, restore and no more.
        """

    def restore_(self, bucket: Bucket) -> None:
        """Return the perturbed slots to w."""
