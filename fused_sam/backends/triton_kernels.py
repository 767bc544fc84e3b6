# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108
"""The Triton kernels, and every rule's mathematics in Triton.

Each kernel walks over a bucket with a persistent grid: program i takes the chunks i, i + P,
i + 2 P, ... of P programs, a fixed order. It reads these tables; n slots, r parameter groups:

    chunks  (c, 2) int32      slot, number of the chunk within the slot; chunks of BLOCK * TILES
    slots   (n, 4) int64      address of the weights, elements, offset in the flat buffers, group
    live    (2 n + r,) int64  address of each gradient or 0; flags of each slot; address of each
                              group's lr, where TENSOR_LR says that it is to be read there
    hyper   (r, k)            hyperparameters of each group, in the compute dtype

The compute dtype is float64 for float64 and float32 otherwise. All offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

PERTURBED: tl.constexpr = tl.constexpr(1)
"""Flag of a slot: its weights w are in ``saved``."""
FRESH: tl.constexpr = tl.constexpr(2)
"""Flag of a slot: its state is still zero."""
ALIGNED: tl.constexpr = tl.constexpr(4)
"""Flag of a slot: the addresses of its weights and of its gradient are multiples of 16."""
SLOT_COLUMNS: tl.constexpr = tl.constexpr(4)
ASCENT_COLUMNS: tl.constexpr = tl.constexpr(3)
"""rho, negative for a group that maximizes; 1 if it is adaptive; eta."""


# -------------------------------------------------------------------------- the rules' mathematics
#
# (param, grad, state, hyper, step, fresh) -> (new param, new state): values in the compute dtype,
# with the names and in the order of fused_sam.rules. ``state`` has a fixed length, and KEPT says
# which buffers are there at all, for some group. ``step`` counts the running step. Groups of one
# launch may differ in every option, so options are values, not branches of the compiler.


#
# `/` and `tl.sqrt` on float32 elements are good to 2 and 1 units in the last place (PTX div.full
# and sqrt.approx, kept from flushing small numbers to zero by the launcher's options); rounding
# them to the nearest takes subroutines and a quarter more registers.


@triton.jit
def _sqrt(x):
    """The square root of a number, to the nearest."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _div(x, y):
    """The quotient of two numbers, to the nearest."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _bias_correction(log_beta, step):
    """``1 - beta**step`` (Kingma & Ba 2015, algorithm 1) without cancellation.

    It is ``-expm1(x)`` with ``x = step * log(beta)``; there is no expm1 that every target and the
    interpreter have. Down to -0.35 this is its Taylor series, whose remainder is below rounding:
    0.35**8 / 9! < 2**-30 for float32, 0.35**14 / 15! < 2**-61 for float64. Below, 1 - exp(x) is
    at least 0.29 and loses less than two bits.
    """
    x = step * log_beta
    terms: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    series = 1 + x * (1.0 / terms)
    for i in tl.static_range(terms - 1, 1, -1):
        series = 1 + series * x * (1.0 / i)
    return tl.where(x > -0.35, -x * series, 1 - tl.exp(x))


@triton.jit
def _descent(grad, maximize):
    return tl.where(maximize != 0, -grad, grad)


@triton.jit
def _decay(param, grad, weight_decay):
    return tl.where(weight_decay != 0, grad + weight_decay * param, grad)


@triton.jit
def sgd(param, grad, state, hyper, step, fresh, KEPT: tl.constexpr):
    """``torch.optim.SGD``."""
    lr, maximize, weight_decay, momentum, undampened, nesterov = hyper
    momentum_buffer = state[0]
    grad = _descent(grad, maximize)
    grad = _decay(param, grad, weight_decay)
    if KEPT[0]:
        # The first gradient enters undampened, as torch.optim.SGD has it.
        undampened = tl.where(fresh, 1.0, undampened).to(grad.dtype)
        momentum_buffer = momentum * momentum_buffer + undampened * grad
        heavy = tl.where(nesterov != 0, grad + momentum * momentum_buffer, momentum_buffer)
        grad = tl.where(momentum != 0, heavy, grad)
    return param - lr * grad, (momentum_buffer,)


@triton.jit
def adam(param, grad, state, hyper, step, fresh, KEPT: tl.constexpr):
    """``torch.optim.Adam`` and ``AdamW``."""
    lr, maximize, weight_decay, decoupled, beta1, rest1, log1, beta2, rest2, log2, eps, amsgrad = (
        hyper
    )
    exp_avg, exp_avg_sq, max_exp_avg_sq = state
    grad = _descent(grad, maximize)
    decayed = tl.where(
        (decoupled != 0) & (weight_decay != 0), param * (1 - lr * weight_decay), param
    )
    grad = tl.where(decoupled != 0, grad, _decay(param, grad, weight_decay))
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (grad * grad)
    second = exp_avg_sq
    if KEPT[2]:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        second = tl.where(amsgrad != 0, max_exp_avg_sq, exp_avg_sq)
    step_size = _div(lr, _bias_correction(log1, step))
    unbias = _div(step * 0 + 1, _bias_correction(log2, step))
    denom = tl.sqrt(second * unbias) + eps
    return decayed - step_size * (exp_avg / denom), (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def rmsprop(param, grad, state, hyper, step, fresh, KEPT: tl.constexpr):
    """``torch.optim.RMSprop``."""
    lr, maximize, weight_decay, alpha, rest, eps, centered, momentum = hyper
    square_avg, grad_avg, momentum_buffer = state
    grad = _descent(grad, maximize)
    grad = _decay(param, grad, weight_decay)
    square_avg = alpha * square_avg + rest * (grad * grad)
    second = square_avg
    if KEPT[1]:
        grad_avg = alpha * grad_avg + rest * grad
        # Rounding can take this variance below zero, where torch.optim.RMSprop gives NaN.
        variance = square_avg - grad_avg * grad_avg
        second = tl.where(centered != 0, tl.where(variance < 0, 0.0, variance), square_avg)
    update = grad / (tl.sqrt(second) + eps)
    if KEPT[2]:
        momentum_buffer = momentum * momentum_buffer + update
        update = tl.where(momentum > 0, momentum_buffer, update)
    return param - lr * update, (square_avg, grad_avg, momentum_buffer)


# ------------------------------------------------------------------------------ walking the tables


@triton.jit
def _locate(
    chunks_ptr,
    slots_ptr,
    live_ptr,
    dtype,
    chunk,
    n_slots,
    SIZE: tl.constexpr,
):
    """What the tables say of a chunk.

    Returns:
        Its slot; whether there is a gradient; pointers to the slot's gradient and weights; the
        slot's offset in the flat buffers; where the chunk begins in the slot; how many elements it
        has; whether it may be accessed in 128 bits, as a full chunk of an aligned slot may; group;
        flags.
    """
    slot = tl.load(chunks_ptr + 2 * chunk).to(tl.int64)
    begin = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * SIZE
    place = slots_ptr + slot * SLOT_COLUMNS
    weights = tl.load(place).to(dtype)
    count = tl.minimum(tl.load(place + 1) - begin, SIZE)
    start = tl.load(place + 2)
    row = tl.load(place + 3)
    address = tl.load(live_ptr + slot)
    grad = address.to(dtype)
    flags = tl.load(live_ptr + n_slots + slot)
    wide = (count == SIZE) & ((flags & ALIGNED) != 0)
    return slot, address != 0, grad, weights, start, begin, count, wide, row, flags


@triton.jit
def _aligned(base, begin, MULTIPLE: tl.constexpr):
    """``base + begin``, a multiple of 16 bytes, or of 64 elements.

    The hint belongs to the operation, and so to every path that its result is used on: call this
    where accesses are wide. Nothing is hinted at elsewhere, so that all operands of a tile lie in
    the threads alike; else they would have to be exchanged, and float16 would spill.
    """
    return tl.multiple_of(base + begin, MULTIPLE)


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
def _asam(weights, adaptive, eta):
    """ASAM's ``T = |w| + eta`` (Kwon et al. 2021, eq. 4), 1 for a group that is not adaptive."""
    return tl.where(adaptive != 0, tl.abs(weights) + eta, 1.0)


# -------------------------------------------------------------------------------------- sq_norm


@triton.jit
def _sq_tile(acc, grad, weights, offs, mask, adaptive, eta, ADAPTIVE: tl.constexpr):
    g = _load(grad + offs, mask, acc.dtype)
    if ADAPTIVE:
        g *= _asam(_load(weights + offs, mask, acc.dtype), adaptive, eta)
    return acc + g * g


@triton.jit(do_not_specialize=["n_chunks", "n_slots"])
def sq_norm_kernel(
    partials_ptr,
    like_ptr,
    chunks_ptr,
    slots_ptr,
    live_ptr,
    hyper_ptr,
    n_chunks,
    n_slots,
    ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program i's sum of (T * g)**2 goes to ``partials[i]``; ``like_ptr`` tells g's dtype."""
    dtype = partials_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK], dtype)
    lanes = tl.arange(0, BLOCK)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        _, present, grad, weights, _, begin, count, wide, row, _ = _locate(
            chunks_ptr, slots_ptr, live_ptr, like_ptr.dtype, chunk, n_slots, BLOCK * TILES
        )
        adaptive = tl.zeros([], dtype)
        eta = tl.zeros([], dtype)
        if ADAPTIVE:
            adaptive = tl.load(hyper_ptr + row * ASCENT_COLUMNS + 1)
            eta = tl.load(hyper_ptr + row * ASCENT_COLUMNS + 2)
        if present:
            if wide:
                g = _aligned(grad, begin, 16)
                w = _aligned(weights, begin, 16)
                for tile in range(TILES):
                    offs = tile * BLOCK + lanes
                    acc = _sq_tile(acc, g, w, offs, None, adaptive, eta, ADAPTIVE)
            else:
                g = grad + begin
                w = weights + begin
                for tile in range(tl.cdiv(count, BLOCK).to(tl.int32)):
                    offs = tile * BLOCK + lanes
                    acc = _sq_tile(acc, g, w, offs, offs < count, adaptive, eta, ADAPTIVE)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(acc))


# -------------------------------------------------------------------------------------- perturb_


@triton.jit
def _perturb_tile(weights, saved, grad, offs, mask, scale, adaptive, eta):
    w = _load(weights + offs, mask, scale.dtype)
    g = _load(grad + offs, mask, scale.dtype)
    t = _asam(w, adaptive, eta)
    # 0 * inf is NaN, and a scale of 0 must move nothing.
    moved = tl.where(scale == 0, w, w + scale * (t * t * g))
    _store(saved + offs, w, mask)
    _store(weights + offs, moved, mask)


@triton.jit(
    do_not_specialize=["n_chunks", "n_slots", "n_partials"],
    do_not_specialize_on_alignment=["sq_norm_ptr"],
)
def perturb_kernel(
    saved_ptr,
    sq_norm_ptr,
    chunks_ptr,
    slots_ptr,
    live_ptr,
    hyper_ptr,
    n_chunks,
    n_slots,
    n_partials,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Save w; ``w += rho * T**2 * g / norm``, norm**2 the sum of ``sq_norm`` (n_partials,)."""
    dtype = sq_norm_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype)
    for i in range(0, n_partials, BLOCK):
        sums += tl.load(sq_norm_ptr + i + lanes, i + lanes < n_partials, 0.0)
    norm = _sqrt(tl.sum(sums))
    climbs = (norm > 0) & (norm < float("inf"))
    # Backwards: what sq_norm read last is what may still be in the cache.
    for i in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        _, present, grad, weights, start, begin, count, wide, row, _ = _locate(
            chunks_ptr,
            slots_ptr,
            live_ptr,
            saved_ptr.dtype,
            n_chunks - 1 - i,
            n_slots,
            BLOCK * TILES,
        )
        if present:
            rho = tl.load(hyper_ptr + row * ASCENT_COLUMNS)
            adaptive = tl.load(hyper_ptr + row * ASCENT_COLUMNS + 1)
            eta = tl.load(hyper_ptr + row * ASCENT_COLUMNS + 2)
            scale = tl.where(climbs, _div(rho, norm), 0.0)
            if wide:
                w = _aligned(weights, begin, 16)
                s = saved_ptr + _aligned(start, begin, 64)
                g = _aligned(grad, begin, 16)
                for tile in range(TILES):
                    offs = tile * BLOCK + lanes
                    _perturb_tile(w, s, g, offs, None, scale, adaptive, eta)
            else:
                w = weights + begin
                s = saved_ptr + start + begin
                g = grad + begin
                for tile in range(tl.cdiv(count, BLOCK).to(tl.int32)):
                    offs = tile * BLOCK + lanes
                    _perturb_tile(w, s, g, offs, offs < count, scale, adaptive, eta)


# --------------------------------------------------------------------------------------- update_


@triton.jit
def _restore_tile(weights, saved, offs, mask):
    tl.store(weights + offs, tl.load(saved + offs, mask), mask)


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


@triton.jit
def _either(condition, x, y):
    """The one or the other address."""
    return tl.where(condition, x.to(tl.int64), y.to(tl.int64))


@triton.jit
def _update_tile(
    weights,
    source,
    grad,
    states,
    start,
    offs,
    mask,
    unscale,
    hyper,
    limits,
    step,
    fresh,
    RULE: tl.constexpr,
    KEPT: tl.constexpr,
):
    dtype = hyper[0].dtype
    w = _load(source + offs, mask, dtype)
    g = _load(grad + offs, mask, dtype)
    if unscale is not None:
        g *= unscale
    state = ()
    for i in tl.static_range(len(states)):
        if not KEPT[i]:
            state = state + (w,)  # a tuple cannot hold None; nobody reads this
        else:
            use = mask if limits is None else offs < limits[i]
            state = state + (_load(states[i] + start + offs, use, dtype),)
    new, state = RULE(w, g, state, hyper, step, fresh, KEPT)
    # 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only the same bits are the same.
    _store(weights + offs, tl.where(hyper[0] == 0, w, new), mask)
    for i in tl.static_range(len(states)):
        if KEPT[i]:
            use = mask if limits is None else offs < limits[i]
            _store(states[i] + start + offs, state[i], use)


@triton.jit(
    do_not_specialize=["n_chunks", "n_slots"],
    do_not_specialize_on_alignment=["grad_scale_ptr", "found_inf_ptr"],
)
def update_kernel(
    saved_ptr,
    states,
    step_ptr,
    ticket_ptr,
    chunks_ptr,
    slots_ptr,
    live_ptr,
    hyper_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    n_chunks,
    n_slots,
    RULE: tl.constexpr,
    KEPT: tl.constexpr,
    HYPER: tl.constexpr,
    MIXED: tl.constexpr,
    TENSOR_LR: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """``w <- rule(saved, g, state)``; without a gradient ``w <- saved``.

    A slot that is not perturbed takes w from its weights. Nothing is computed if ``found_inf`` is
    not 0: then perturbed slots are restored and no more.

    ``saved_ptr`` and ``states`` are (size,) in the bucket's dtype; KEPT says which states some
    group keeps, and the others point anywhere (Triton 3.6 takes no None in a tuple). ``step_ptr``
    (n,) float32 is incremented for the slots that step; ``ticket_ptr`` () int32 is 0 before and
    after; ``grad_scale_ptr`` and ``found_inf_ptr`` are () float32; None where there is none. HYPER
    counts the rule's hyperparameters; in a MIXED launch some groups lack some state, and
    len(states) columns more say who keeps what.
    """
    dtype = hyper_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    steps = True
    if found_inf_ptr is not None:
        steps = tl.load(found_inf_ptr) == 0
    unscale = None
    if grad_scale_ptr is not None:
        unscale = _div(tl.full([], 1, dtype), tl.load(grad_scale_ptr).to(dtype))
    columns: tl.constexpr = HYPER + (len(states) if MIXED else 0)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        slot, present, grad, weights, start, begin, count, wide, row, flags = _locate(
            chunks_ptr, slots_ptr, live_ptr, saved_ptr.dtype, chunk, n_slots, BLOCK * TILES
        )
        perturbed = (flags & PERTURBED) != 0
        if present & steps:
            options = hyper_ptr + row * columns
            lr = tl.load(options)
            if TENSOR_LR:
                lr_address = tl.load(live_ptr + 2 * n_slots + row)
                if lr_address != 0:
                    lr = tl.load(lr_address.to(hyper_ptr.dtype))
            hyper = (lr,)
            for i in tl.static_range(1, HYPER):
                hyper = hyper + (tl.load(options + i),)
            limits = None
            if MIXED:
                limits = ()
                for i in tl.static_range(len(states)):
                    limits = limits + (tl.where(tl.load(options + HYPER + i) != 0, count, 0),)
            step = None
            if step_ptr is not None:
                step = tl.load(step_ptr + slot).to(dtype) + 1
            fresh = (flags & FRESH) != 0
            if wide:
                w = _aligned(weights, begin, 16)
                g = _aligned(grad, begin, 16)
                at = _aligned(start, begin, 64)
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
                        unscale,
                        hyper,
                        limits,
                        step,
                        fresh,
                        RULE,
                        KEPT,
                    )
            else:
                w = weights + begin
                g = grad + begin
                at = start + begin
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
                        unscale,
                        hyper,
                        limits,
                        step,
                        fresh,
                        RULE,
                        KEPT,
                    )
        elif perturbed:
            _restore(weights, saved_ptr, start, begin, count, wide, lanes, BLOCK, TILES)
    if step_ptr is not None:
        # Every chunk of a slot needs the old count: whoever comes last, of all programs, counts.
        tl.debug_barrier()  # all of this program's threads have read their counts
        ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
        if ticket == tl.num_programs(0) - 1:
            tl.store(ticket_ptr, 0)
            if steps:
                for i in range(0, n_slots, BLOCK):
                    slot = i + lanes
                    present = tl.load(live_ptr + slot, slot < n_slots, 0) != 0
                    count = tl.load(step_ptr + slot, slot < n_slots, 0.0)
                    tl.store(step_ptr + slot, count + 1, present)


@triton.jit(do_not_specialize=["n_chunks", "n_slots"])
def restore_kernel(
    saved_ptr,
    chunks_ptr,
    slots_ptr,
    live_ptr,
    n_chunks,
    n_slots,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Return the perturbed slots to ``saved``."""
    lanes = tl.arange(0, BLOCK)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        _, _, _, weights, start, begin, count, wide, _, flags = _locate(
            chunks_ptr, slots_ptr, live_ptr, saved_ptr.dtype, chunk, n_slots, BLOCK * TILES
        )
        if (flags & PERTURBED) != 0:
            _restore(weights, saved_ptr, start, begin, count, wide, lanes, BLOCK, TILES)
