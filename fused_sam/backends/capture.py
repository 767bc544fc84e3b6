"""CUDA graphs: a capture records addresses and numbers, and a replay finds what is there then.

So what a capture has seen stays alive, what a first step does only once must be done before, and
when the memory is laid out anew somebody has to say so. That is the same for all backends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ascents import chosen
from ..devices import on
from ..memory.members import AVERAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..memory import Gradients, Layout
    from ..memory.state import State

_WARM_UP = "run one step before the capture"


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on this device now is recorded for a CUDA graph, and not run."""
    if device.type != "cuda":
        return False
    with on(device):  # torch asks the current device's stream
        return torch.cuda.is_current_stream_capturing()


def refuse_to_prepare(device: torch.device, what: str) -> None:
    """Raise in a capture: what is prepared once would be prepared at every replay, or not at all.

    Raises:
        RuntimeError: the current stream of ``device`` is capturing.
    """
    if is_capturing(device):
        raise RuntimeError(f"a CUDA graph is being captured, and {what}; {_WARM_UP}")


def check_version() -> None:
    """Raise unless this torch can capture a step.

    Raises:
        RuntimeError: it is older than 2.11.
    """
    if torch.__version__ < "2.11":
        raise RuntimeError(
            f"a CUDA graph is being captured with torch {torch.__version__}, where a capture "
            f"has no pool of pinned memory for the tables that FusedSAM uploads; install "
            f"torch 2.11 or later, or step without a graph"
        )


class Captures:
    """What the CUDA graphs of an optimizer have seen, and whether they still fit it."""

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._rates: list[Tensor] = []
        self._misfit: str | None = None

    def have_seen(self, layout: Layout) -> bool:
        """Whether some capture has recorded addresses of this layout."""
        return any([seen is layout for seen, *_ in self._seen])

    def see(
        self,
        layout: Layout,
        grads: Sequence[Gradients],
        groups: Sequence[Mapping[str, Any]],
        state: State,
    ) -> None:
        """Keep alive, for ever, what a capture of a step with these gradients is about to record.

        Raises:
            RuntimeError: this torch cannot do it; or state was replaced since the last step, or a
                parameter with a gradient lacks some: every replay would bring it in anew. Or the
                climb's average of the gradients is not there, which would begin at every replay.
        """
        check_version()
        rule = layout.rule
        if rule and not layout.states.is_current(state):
            raise RuntimeError(
                f"a CUDA graph is being captured, and optimizer state was replaced since the last "
                f"step: every replay would go back to it; {_WARM_UP}"
            )
        for bucket, bucket_grads in zip(layout.buckets, grads, strict=True):
            for i, (slot, there) in enumerate(zip(bucket.slots, bucket_grads.present, strict=True)):
                names = rule.kept(groups[slot.row]) if rule and there else ()
                for name in names:
                    if name not in bucket.states or not bucket.states[name].present[i]:
                        raise RuntimeError(
                            f"a CUDA graph is being captured, and a parameter of shape "
                            f"{tuple(slot.shape)} has no {name!r} yet: every replay would be a "
                            f"first step; {_WARM_UP}"
                        )
        if chosen(groups).average is not None:
            for bucket in layout.buckets:
                climb = any([groups[row]["ascent"] is not None for row in bucket.rows])
                if climb and AVERAGE not in bucket.members:
                    raise RuntimeError(
                        f"a CUDA graph is being captured, and the average of the gradients that "
                        f"ascent={chosen(groups).key!r} climbs by is not there yet: it would begin "
                        f"anew at every replay; {_WARM_UP}"
                    )
        if not self.have_seen(layout):
            # Pinned parameters are the user's, who may put other memory in their place.
            pinned = [b.memory(slot) for b in layout.buckets for slot in b.slots if slot.pinned]
            self._seen.append((layout, pinned, [bucket.cache for bucket in layout.buckets]))
        self._rates += [group["lr"] for group in groups if isinstance(group.get("lr"), Tensor)]
        self._misfit = None

    def renew(self) -> None:
        """A new capture is about to be made: nobody need be told to make one."""
        self._misfit = None

    def outdate(self, why: str) -> None:
        """Note that graphs captured so far do not fit the optimizer any more."""
        if self._seen:
            self._misfit = why

    def complain(self) -> None:
        """Raise once what ``outdate`` has noted."""
        why, self._misfit = self._misfit, None
        if why is not None:
            raise RuntimeError(
                f"a CUDA graph was captured, and since then {why}; take one more step and capture "
                f"it again. This error comes once: the next call goes on without the graph"
            )
