"""Memory: buckets of flat buffers, and the windows through which the model sees its parameters.

Parameters of one device and dtype form a bucket, those that train: frozen ones keep their memory.
The bucket owns one flat buffer of saved weights and one for each optimizer state, all with the same
element offsets; complex numbers are pairs of reals. The weights are cut into several allocations:
each lives as long as one of its parameters, so that a small one that is left of a model does not
keep all. A parameter becomes a window of its allocation with a storage of its own, so that saving
one layer writes one layer. Parameters that must not move are pinned: they stay where they are, and
only their saved weights and state live in the bucket.
"""

from .bucket import Bucket
from .gradients import Gradients, Stale
from .layout import Layout
from .slot import Slot

__all__ = ["Bucket", "Gradients", "Layout", "Slot", "Stale"]
