"""SAM in the frameworks that people train in: one file for each, imported by nobody but its user.

Each brings one line for the user and the same step: the first pass over all micro-batches of a
step as the framework does it, the climb, and the second pass over the same micro-batches with the
same random numbers, running statistics left alone. Clipping, schedulers, counters and checkpoints
stay the framework's; clipping sees the gradients of the second pass only.

``fused_sam`` itself needs torch alone. A framework is imported when its file here is.
"""
