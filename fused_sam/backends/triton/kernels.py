# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102, SIM108
"""The Triton kernels: walking over a bucket, loads and stores. The mathematics is handed in.

Each kernel walks over a bucket's chunks with a persistent grid: program i takes the chunks i,
i + P, i + 2 P, ... of P programs, a fixed order. It reads the tables of ``backends/tables.py``;
n slots, r parameter groups:

    slots  (4 n + 2 c,) int64  of each slot: offset in the flat buffers, elements, group, address of
                               the weights; then of each chunk: its slot, and where it begins there
    grads  (n,) int64          address of each gradient
    flags  (n,) int32          the bits of each slot
    hyper  (r, k)              numbers of each group, in the compute dtype

The compute dtype is float64 for float64 weights and float32 otherwise; WEIGHT and GRAD are the
dtypes of weights and gradients. All offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import tables

PERTURBED: tl.constexpr = tl.constexpr(tables.PERTURBED)
FRESH: tl.constexpr = tl.constexpr(tables.FRESH)
MISSING: tl.constexpr = tl.constexpr(tables.MISSING)
ALIGNED: tl.constexpr = tl.constexpr(tables.ALIGNED)
MAXIMIZE: tl.constexpr = tl.constexpr(tables.MAXIMIZE)
HELD: tl.constexpr = tl.constexpr(tables.HELD)
BLENDS: tl.constexpr = tl.constexpr(tables.BLENDS)
KEPT_SHIFT: tl.constexpr = tl.constexpr(tables.KEPT_SHIFT)


# ------------------------------------------------------------------------------ walking the tables


@triton.jit
def _locate(slots_ptr, flags_ptr, chunk, n_slots, WEIGHT: tl.constexpr, SIZE: tl.constexpr):
    """What the tables say of a chunk.

    Returns:
        Its slot; a pointer to the slot's weights; the slot's offset in the flat buffers; where the
        chunk begins in the slot; how many elements it has; whether it may be accessed in 128 bits,
        as a full chunk of an aligned slot may; group; flags.
    """
    place = slots_ptr + 4 * n_slots + 2 * chunk
    slot = tl.load(place)
    begin = tl.load(place + 1)
    place = slots_ptr + 4 * slot
    start = tl.load(place)
    count = tl.minimum(tl.load(place + 1) - begin, SIZE)
    row = tl.load(place + 2)
    weights = tl.load(place + 3).to(tl.pointer_type(WEIGHT))
    flags = tl.load(flags_ptr + slot)
    wide = (count == SIZE) & ((flags & ALIGNED) != 0)
    return slot, weights, start, begin, count, wide, row, flags


@triton.jit
def _aligned(base, begin, MULTIPLE: tl.constexpr):
    """``base + begin``, a multiple of 16 bytes, or of 64 elements.

    The hint belongs to the operation, and so to every path that its result is used on: call this
    where accesses are wide. Nothing is hinted at elsewhere, so that all operands of a tile lie in
    the threads alike; else they would have to be exchanged, and float16 would spill.
    """
    return tl.multiple_of(base + begin, MULTIPLE)


@triton.jit
def _columns(ptr, COUNT: tl.constexpr):
    """Numbers of a group, which begin there, as a tuple."""
    columns = ()
    for i in tl.static_range(COUNT):
        columns = columns + (tl.load(ptr + i),)
    return columns


@triton.jit
def _load(ptr, mask, dtype):
    if mask is None:
        value = tl.load(ptr)
    else:
        value = tl.load(ptr, mask, 0.0)
    return value.to(dtype)


@triton.jit
def _store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask)


@triton.jit
def _hash(x):
    """``rounding.py`` says which; of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _store_stochastically(ptr, value, at, seed, mask):
    """Store float32 as one of its two neighbours in half precision, others as they are.

    The same as ``rounding.py``, bit for bit; ``at`` are the offsets in the flat buffers.
    """
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        noise = _hash(at.to(tl.uint32) ^ seed)
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if dtype == tl.bfloat16:
            half = (bits + (noise >> 16)) >> 16
            limit: tl.constexpr = 0x7F7F0000
        else:
            normal = (magnitude - 0x38000000 + (noise >> 19)) >> 13
            # Below it the neighbours are integers times 2**-24: in units of 2**-45.
            small = magnitude < 0x38800000
            units = tl.where(small, tl.abs(value) * 35184372088832.0, 0.0).to(tl.int32)
            subnormal = (units.to(tl.uint32, bitcast=True) + (noise >> 11)) >> 21
            half = tl.where(small, subnormal, normal)
            half |= (bits >> 16) & 0x8000
            limit: tl.constexpr = 0x477FE000
        rounded = half.to(tl.uint16).to(dtype, bitcast=True)
        value = tl.where(magnitude < limit, rounded, value.to(dtype))
    _store(ptr, value, mask)


@triton.jit
def _is_last(ticket_ptr):
    """Whether this is the last program that comes here: all have done what they do before.

    The ticket is 0 at first, and again afterwards.
    """
    tl.debug_barrier()  # all of this program's threads are here
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    last = ticket == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


# ---------------------------------------------------------------------------------------- reduce


@triton.jit
def _numbers(ptr, dtype, COUNT: tl.constexpr):
    """The numbers that were reduced before, as a tuple."""
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers = numbers + (tl.load(ptr + i).to(dtype),)
    return numbers


@triton.jit
def _add(all, terms, MAX: tl.constexpr):
    """The next terms of a sum, or of a largest number, which NaN wins."""
    if MAX:
        result = tl.maximum(all, terms, propagate_nan=tl.PropagateNan.ALL)
    else:
        result = all + terms
    return result


@triton.jit
def _all_of(terms, MAX: tl.constexpr):
    """The sum of a tile, or the largest number, which NaN wins."""
    if MAX:
        there = terms == terms
        nan = tl.sum(tl.where(there, 0.0, terms).to(terms.dtype))
        result = tl.max(tl.where(there, terms, 0.0).to(terms.dtype)) + nan
    else:
        result = tl.sum(terms)
    return result


@triton.jit
def _reduce_tile(
    all,
    grad,
    others,
    average,
    at,
    offs,
    mask,
    held,
    numbers,
    columns,
    follows,
    TERMS: tl.constexpr,
    FOLLOW: tl.constexpr,
    MAX: tl.constexpr,
    READS: tl.constexpr,
    KEPT: tl.constexpr,
):
    dtype = all[0].dtype
    g = _load(grad + offs, mask, dtype)
    if average is not None:
        g, _ = FOLLOW(g, _load(average + at + offs, mask, dtype), *follows)
    x = _load(others + offs, mask, dtype) if READS else None
    if KEPT:
        x = tl.where(held, x, 0.0).to(dtype)
    # Lanes without an element hold zeros, of which terms make zeros.
    terms = TERMS(x, g, *numbers, *columns)
    new = ()
    if len(all) == 1:
        new = (_add(all[0], terms, MAX),)
    else:
        for i in tl.static_range(len(all)):
            new = new + (_add(all[i], terms[i], MAX),)
    return new


@triton.jit(
    do_not_specialize=["n_chunks", "n_slots"], do_not_specialize_on_alignment=["earlier_ptr"]
)
def reduce_kernel(
    total_ptr,
    partials_ptr,
    ticket_ptr,
    kept_ptr,
    average_ptr,
    earlier_ptr,
    slots_ptr,
    grads_ptr,
    flags_ptr,
    hyper_ptr,
    n_chunks,
    n_slots,
    TERMS: tl.constexpr,
    FOLLOW: tl.constexpr,
    COUNT: tl.constexpr,
    MAX: tl.constexpr,
    EARLIER: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLLOWS: tl.constexpr,
    READS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """The sums of TERMS over all elements, or the maximum, go to ``total`` (COUNT,) float64.

    ``earlier`` (EARLIER,) float64 are the numbers that TERMS need; None where they need none.
    ``partials`` (COUNT, programs) in the dtype of the terms is scratch; ``ticket`` (1,) int32
    is 0 before and after. READS: whether some group's terms need the weights, or, where
    ``kept`` is not None, what is in there of the slots whose flags say so.

    Where ``average`` (size,) in the compute dtype is not None, TERMS get the directions that
    FOLLOW makes of it and the gradients; its numbers are the last FOLLOWS of each group's COLUMNS.
    """
    dtype = partials_ptr.dtype.element_ty
    all = ()
    for _ in tl.static_range(COUNT):
        all = all + (tl.zeros([BLOCK], dtype),)
    lanes = tl.arange(0, BLOCK)
    numbers = _numbers(earlier_ptr, dtype, EARLIER)
    KEPT: tl.constexpr = kept_ptr is not None
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        slot, weights, start, begin, count, wide, row, flags = _locate(
            slots_ptr, flags_ptr, chunk, n_slots, WEIGHT, BLOCK * TILES
        )
        if (flags & MISSING) == 0:
            grad = tl.load(grads_ptr + slot).to(tl.pointer_type(GRAD))
            row_ptr = hyper_ptr + row * COLUMNS
            columns = _columns(row_ptr, COLUMNS - FOLLOWS)
            follows = _columns(row_ptr + COLUMNS - FOLLOWS, FOLLOWS)
            held = (flags & HELD) != 0
            others = kept_ptr + start if KEPT else weights
            if wide:
                g = _aligned(grad, begin, 16)
                x = _aligned(others, begin, 16)
                at = _aligned(start, begin, 64)
                for tile in range(TILES):
                    offs = tile * BLOCK + lanes
                    all = _reduce_tile(
                        *(all, g, x, average_ptr, at, offs, None, held, numbers, columns, follows),
                        *(TERMS, FOLLOW, MAX, READS, KEPT),
                    )
            else:
                g = grad + begin
                x = others + begin
                at = start + begin
                for tile in range(tl.cdiv(count, BLOCK).to(tl.int32)):
                    offs = tile * BLOCK + lanes
                    all = _reduce_tile(
                        *(all, g, x, average_ptr, at, offs, offs < count, held, numbers, columns),
                        *(follows, TERMS, FOLLOW, MAX, READS, KEPT),
                    )
    for c in tl.static_range(COUNT):
        place = partials_ptr + c * tl.num_programs(0)
        tl.store(place + tl.program_id(0), _all_of(all[c], MAX))
    if _is_last(ticket_ptr):
        for c in tl.static_range(COUNT):
            place = partials_ptr + c * tl.num_programs(0)
            sums = tl.zeros([BLOCK], dtype)
            for i in range(0, tl.num_programs(0), BLOCK):
                there = i + lanes < tl.num_programs(0)
                # From the L2 cache, where the other programs' sums are.
                part = tl.load(place + i + lanes, there, 0.0, cache_modifier=".cg")
                sums = _add(sums, part, MAX)
            tl.store(total_ptr + c, _all_of(sums, MAX).to(tl.float64))


# --------------------------------------------------------------------------------------- ascend_


@triton.jit
def _masters(weights, saved, offs, mask, use):
    """The masters of a tile, and where it is the weights: those that were changed from outside.

    Weights are looked at where ``use`` says, or ``mask`` if that is None.
    """
    master = tl.load(saved + offs, mask)
    w = tl.load(weights + offs, mask if use is None else use)
    rounded = master.to(w.dtype).to(tl.uint16, bitcast=True)
    changed = rounded != w.to(tl.uint16, bitcast=True)
    if use is not None:
        changed = changed & use
    return tl.where(changed, w.to(tl.float32), master), changed


@triton.jit
def _ascend_tile(
    weights,
    saved,
    kept,
    average,
    at,
    grad,
    offs,
    mask,
    seed,
    finite,
    scalars,
    follows,
    MOVE: tl.constexpr,
    FOLLOW: tl.constexpr,
    MASTERS: tl.constexpr,
):
    scale = scalars[0]
    if MASTERS:
        w, changed = _masters(weights, saved + at, offs, mask, None)
    else:
        w = _load(weights + offs, mask, scale.dtype)
    g = _load(grad + offs, mask, scale.dtype)
    if kept is not None:
        _store(kept + at + offs, g, mask)
    if average is not None:
        m = _load(average + at + offs, mask, scale.dtype)
        g, new = FOLLOW(g, m, *follows)
        _store(average + at + offs, tl.where(finite, new, m), mask)
    # 0 * inf is NaN, and a scale of 0 must move nothing.
    stays = w
    if MASTERS:  # which are not to be rounded anew
        stays = w.to(weights.dtype.element_ty).to(w.dtype)
    moved = tl.where(scale == 0, stays, MOVE(w, g, *scalars))
    if MASTERS:
        _store(saved + at + offs, w, changed if mask is None else changed & mask)
    else:
        _store(saved + at + offs, w, mask)
    _store_stochastically(weights + offs, moved, at + offs, seed, mask)


@triton.jit(
    do_not_specialize=["n_chunks", "n_slots", "number"],
    do_not_specialize_on_alignment=["total_ptr", "number_ptr"],
)
def ascend_kernel(
    saved_ptr,
    kept_ptr,
    average_ptr,
    climb_ptr,
    total_ptr,
    slots_ptr,
    grads_ptr,
    flags_ptr,
    hyper_ptr,
    number_ptr,
    number,
    n_chunks,
    n_slots,
    SCALARS: tl.constexpr,
    MOVE: tl.constexpr,
    FOLLOW: tl.constexpr,
    NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLLOWS: tl.constexpr,
    MASTERS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Save w and climb by ``total`` (NUMBERS,) float64; ``number`` goes to ``climb`` (1,) int64.

    ``number_ptr`` is where it is, (1,) int64; None where it is an argument.
    ``kept`` gets the gradients; None where nobody wants them. ``average`` is as for
    ``reduce_kernel``; it takes the gradients in, unless the first of the numbers is not finite.
    """
    dtype = hyper_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    if number_ptr is not None:
        number = tl.load(number_ptr)
    if tl.program_id(0) == 0:
        tl.store(climb_ptr, number)
    numbers = _numbers(total_ptr, dtype, NUMBERS)
    finite = numbers[0] - numbers[0] == 0
    seed = _hash(tl.full([], number, tl.uint32))
    # Backwards: what reduce read last is what may still be in the cache.
    for i in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        slot, weights, start, begin, count, wide, row, flags = _locate(
            slots_ptr, flags_ptr, n_chunks - 1 - i, n_slots, WEIGHT, BLOCK * TILES
        )
        if (flags & MISSING) == 0:
            grad = tl.load(grads_ptr + slot).to(tl.pointer_type(GRAD))
            row_ptr = hyper_ptr + row * COLUMNS
            scalars = SCALARS(*numbers, *_columns(row_ptr, COLUMNS - FOLLOWS))
            follows = _columns(row_ptr + COLUMNS - FOLLOWS, FOLLOWS)
            if wide:
                w = _aligned(weights, begin, 16)
                at = _aligned(start, begin, 64)
                g = _aligned(grad, begin, 16)
                for tile in range(TILES):
                    offs = tile * BLOCK + lanes
                    _ascend_tile(
                        *(w, saved_ptr, kept_ptr, average_ptr, at, g, offs, None, seed, finite),
                        *(scalars, follows, MOVE, FOLLOW, MASTERS),
                    )
            else:
                w = weights + begin
                at = start + begin
                g = grad + begin
                for tile in range(tl.cdiv(count, BLOCK).to(tl.int32)):
                    offs = tile * BLOCK + lanes
                    mask = offs < count
                    _ascend_tile(
                        *(w, saved_ptr, kept_ptr, average_ptr, at, g, offs, mask, seed, finite),
                        *(scalars, follows, MOVE, FOLLOW, MASTERS),
                    )


# --------------------------------------------------------------------------------------- restore_


@triton.jit
def _restore_tile(weights, saved, offs, mask):
    _store(weights + offs, tl.load(saved + offs, mask), mask)


@triton.jit
def _restore(
    weights, saved_ptr, start, begin, count, wide, lanes, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    if wide:
        w = _aligned(weights, begin, 16)
        s = saved_ptr + _aligned(start, begin, 64)
        for tile in range(TILES):
            _restore_tile(w, s, tile * BLOCK + lanes, None)
    else:
        w = weights + begin
        s = saved_ptr + start + begin
        for tile in range(tl.cdiv(count, BLOCK).to(tl.int32)):
            offs = tile * BLOCK + lanes
            _restore_tile(w, s, offs, offs < count)


@triton.jit(do_not_specialize=["n_chunks", "n_slots"])
def restore_kernel(
    saved_ptr,
    climb_ptr,
    slots_ptr,
    flags_ptr,
    n_chunks,
    n_slots,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Return the perturbed slots to ``saved``."""
    lanes = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(climb_ptr, 0)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        _, weights, start, begin, count, wide, _, flags = _locate(
            slots_ptr, flags_ptr, chunk, n_slots, WEIGHT, BLOCK * TILES
        )
        if (flags & PERTURBED) != 0:
            _restore(weights, saved_ptr, start, begin, count, wide, lanes, BLOCK, TILES)


# ---------------------------------------------------------------------------------------- update_


@triton.jit
def _either(condition, x, y):
    """The one or the other address."""
    return tl.where(condition, x.to(tl.int64), y.to(tl.int64))


@triton.jit
def _apply(RULE: tl.constexpr, param, grad, state, scalars, KEPT: tl.constexpr):
    """A rule's text; a tuple cannot hold None, which stands for a state that nobody keeps."""
    if len(KEPT) == 1:
        new = RULE(param, grad, state[0] if KEPT[0] else None, *scalars)
    elif len(KEPT) == 2:
        new = RULE(
            *(param, grad),
            state[0] if KEPT[0] else None,
            state[1] if KEPT[1] else None,
            *scalars,
        )
    else:
        new = RULE(
            *(param, grad),
            state[0] if KEPT[0] else None,
            state[1] if KEPT[1] else None,
            state[2] if KEPT[2] else None,
            *scalars,
        )
    return new


@triton.jit
def _mix(x, y, g, first):
    """``x * g + y * first``; what has the factor 0 may be anything, and 0 * inf is NaN."""
    return tl.where(x == 0, 0.0, x * g).to(g.dtype) + tl.where(y == 0, 0.0, y * first).to(g.dtype)


@triton.jit
def _update_tile(
    weights,
    source,
    grad,
    states,
    at,
    offs,
    mask,
    limits,
    lr,
    descent,
    perturbed,
    kept,
    direction,
    blend,
    scalars,
    RULE: tl.constexpr,
    KEPT: tl.constexpr,
    MASTERS: tl.constexpr,
    AFTER: tl.constexpr,
):
    if MASTERS:
        # Away from w only the masters are right; at w the weights are looked at, too.
        at_w = (offs >= 0) & (perturbed == 0)
        w, _ = _masters(weights, source, offs, mask, at_w if mask is None else at_w & mask)
    else:
        w = _load(source + offs, mask, descent.dtype)
    g = _load(grad + offs, mask, descent.dtype)
    if kept is not None:
        first = _load(kept + at + offs, mask, descent.dtype)
        if AFTER:
            after = _mix(blend[2], blend[3], g, first)
        mixed = _mix(blend[0], blend[1], g, first)
        if direction is None:
            g = mixed
        else:
            _store(direction + at + offs, mixed, mask)
    g = descent * g
    state = ()
    for i in tl.static_range(len(states)):
        if KEPT[i]:
            use = mask if limits is None else offs < limits[i]
            state = state + (_load(states[i] + at + offs, use, descent.dtype),)
        else:
            state = state + (w,)  # nobody reads this
    new = _apply(RULE, w, g, state, scalars, KEPT)
    # 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only the same bits are the same.
    value = new[0]
    if AFTER:
        value -= after
    value = tl.where(lr == 0, w, value)
    if MASTERS:
        _store(source + offs, value, mask)
    _store(weights + offs, value, mask)
    for i in tl.static_range(len(states)):
        if KEPT[i]:
            use = mask if limits is None else offs < limits[i]
            _store(states[i] + at + offs, new[1 + i], use)


@triton.jit(
    do_not_specialize=["n_chunks", "n_slots"],
    do_not_specialize_on_alignment=[
        *("grad_scale_ptr", "found_inf_ptr", "numbers_ptr", "loss_scale_ptr")
    ],
)
def update_kernel(
    saved_ptr,
    kept_ptr,
    direction_ptr,
    states,
    step_ptr,
    ticket_ptr,
    climb_ptr,
    slots_ptr,
    grads_ptr,
    flags_ptr,
    hyper_ptr,
    numbers_ptr,
    blend_ptr,
    loss_scale_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    n_chunks,
    n_slots,
    SCALARS: tl.constexpr,
    RULE: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLEND_NUMBERS: tl.constexpr,
    BLEND_COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    MIXED: tl.constexpr,
    MASTERS: tl.constexpr,
    AFTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """``w <- rule(saved, g, state)``; without a gradient ``w <- saved``.

    A slot that is not perturbed takes w from its weights. Nothing is computed if ``found_inf`` is
    not 0: then perturbed slots are restored and no more.

    ``saved`` and ``states`` are (size,); with MASTERS ``saved`` holds them, and they are what is
    stepped. KEPT says which states some group
    keeps, and the others point anywhere (Triton 3.6 takes no None in a tuple); in a MIXED launch
    the flags of a slot say which ones its group keeps. ``step`` (n,) float32 is incremented for
    the slots that step; ``ticket`` (1,) int32 is 0 before and after; ``climb`` (1,) int64 becomes
    0; ``grad_scale`` and ``found_inf`` are () float32; None where there is none.

    Where ``kept`` (size,), gradients at w or a direction, is not None, g is a blend of both in the
    slots whose flags say so: ``numbers`` (BLEND_NUMBERS,) float64, ``loss_scale`` () float64 (None
    for 1; or the direction's norm) and ``blend``, the hyperparameters, give its COEFFICIENTS.
    AFTER: so they do for what is subtracted from w after the rule. Where ``direction`` (size,) is
    not None, the blend goes there, and g is the gradient.
    """
    dtype = hyper_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(climb_ptr, 0)
    steps = True
    if found_inf_ptr is not None:
        steps = tl.load(found_inf_ptr) == 0
    unscale = tl.full([], 1, dtype)
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr).to(dtype)
        unscale = unscale / scale if dtype == tl.float64 else tl.div_rn(unscale, scale)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        slot, weights, start, begin, count, wide, row, flags = _locate(
            slots_ptr, flags_ptr, chunk, n_slots, WEIGHT, BLOCK * TILES
        )
        perturbed = (flags & PERTURBED) != 0
        if ((flags & MISSING) == 0) & steps:
            grad = tl.load(grads_ptr + slot).to(tl.pointer_type(GRAD))
            descent = tl.where((flags & MAXIMIZE) != 0, -unscale, unscale)
            columns = _columns(hyper_ptr + row * COLUMNS, COLUMNS)
            lr = columns[0]
            blend = (lr,)  # nobody reads it
            if kept_ptr is not None:
                loss_scale = tl.full([], 1, tl.float64)
                if loss_scale_ptr is not None:
                    loss_scale = tl.load(loss_scale_ptr)
                options = ()
                for i in tl.static_range(BLEND_COLUMNS):
                    options = options + (
                        tl.load(blend_ptr + row * BLEND_COLUMNS + i).to(tl.float64),
                    )
                numbers = _numbers(numbers_ptr, tl.float64, BLEND_NUMBERS)
                found = COEFFICIENTS(*numbers, loss_scale, *options)
                blends = (flags & BLENDS) != 0
                both = blends & ((flags & HELD) != 0)
                blend = (
                    tl.where(blends, found[0], 1.0).to(dtype),
                    tl.where(both, found[1], 0.0).to(dtype),
                )
                if AFTER:
                    rate = tl.where((flags & MAXIMIZE) != 0, -lr, lr).to(tl.float64)
                    blend = blend + (
                        tl.where(blends, rate * found[2], 0.0).to(dtype),
                        tl.where(both, rate * found[3], 0.0).to(dtype),
                    )
            step = tl.full([], 1, dtype)
            if step_ptr is not None:
                step = tl.load(step_ptr + slot).to(dtype) + 1
            scalars = SCALARS(*columns, step, (flags & FRESH) != 0)
            limits = None
            if MIXED:
                limits = ()
                for i in tl.static_range(len(states)):
                    kept = (flags >> (KEPT_SHIFT + i)) & 1
                    limits = limits + (tl.where(kept != 0, count, 0),)
            if wide:
                w = _aligned(weights, begin, 16)
                g = _aligned(grad, begin, 16)
                at = _aligned(start, begin, 64)
                if MASTERS:
                    source = saved_ptr + at
                else:
                    source = _either(perturbed, saved_ptr + at, w).to(saved_ptr.dtype)
                    source = tl.multiple_of(source, 16)
                for tile in range(TILES):
                    offs = tile * BLOCK + lanes
                    _update_tile(
                        w,
                        source,
                        g,
                        states,
                        at,
                        offs,
                        None,
                        limits,
                        lr,
                        descent,
                        perturbed,
                        kept_ptr,
                        direction_ptr,
                        blend,
                        scalars,
                        RULE,
                        KEPT,
                        MASTERS,
                        AFTER,
                    )
            else:
                w = weights + begin
                g = grad + begin
                at = start + begin
                if MASTERS:
                    source = saved_ptr + at
                else:
                    source = _either(perturbed, saved_ptr + at, w).to(saved_ptr.dtype)
                for tile in range(tl.cdiv(count, BLOCK).to(tl.int32)):
                    offs = tile * BLOCK + lanes
                    _update_tile(
                        w,
                        source,
                        g,
                        states,
                        at,
                        offs,
                        offs < count,
                        limits,
                        lr,
                        descent,
                        perturbed,
                        kept_ptr,
                        direction_ptr,
                        blend,
                        scalars,
                        RULE,
                        KEPT,
                        MASTERS,
                        AFTER,
                    )
        elif perturbed:
            _restore(weights, saved_ptr, start, begin, count, wide, lanes, BLOCK, TILES)
    if step_ptr is not None:
        # Every chunk of a slot needs the old count: whoever comes last, of all programs, counts.
        if _is_last(ticket_ptr):
            if steps:
                for i in range(0, n_slots, BLOCK):
                    slot = i + lanes
                    flags = tl.load(flags_ptr + slot, slot < n_slots, MISSING)
                    count = tl.load(step_ptr + slot, slot < n_slots, 0.0)
                    tl.store(step_ptr + slot, count + 1, (flags & MISSING) == 0)
