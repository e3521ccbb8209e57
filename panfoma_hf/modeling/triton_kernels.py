# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""The selective scan and the short convolution on CUDA, in Triton: nothing is compiled before first use.

A program scans a block of channels of one cell in one direction, with all states in registers, reading the inputs of
the next step while it computes this one; both directions are programs of one launch. For backward passes the states
before blocks of `BLOCK_STEPS` steps are kept; the way back first recomputes a block's states into a scratch. Sums over
programs are made by torch afterwards instead of by atomics, so the same input gives the same bits.

Computed in float32 whatever the sequences' dtype. ``TRITON_INTERPRET=1``, set before the first import of triton, runs
the same code on CPU tensors.
"""

import contextlib

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "The backend 'triton' needs the package triton, which cannot be imported here. "
        "Install it with `pip install triton`, or leave `backend` out."
    ) from error


# Steps between the states that are kept. The scratch of the way back holds as many states of every channel.
BLOCK_STEPS = 32
# Channels and warps of a program, and steps of the convolution's: chosen by registers and shuffles in what is
# compiled for an H100 (docs/log.md), not yet by time. One warp needs no barrier; wide ones leave fewer partial sums.
_FORWARD = {"CHANNELS": 32, "num_warps": 1}
_BACKWARD = {"CHANNELS": 64, "num_warps": 2}
_CONV = {"CHANNELS": 64, "STEPS": 16, "num_warps": 4}


# ----------------------------------------------------------------------------------------------------------------------
# Parts of kernels
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _pick(direction, first, second):
    """A tensor of the program's direction; with one direction both are the same."""
    chosen = first
    if direction == 1:
        chosen = second
    return chosen


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    # log(1 + e) for e = exp(-|x|), corrected for what 1 + e rounds away: exact for very negative x too.
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    log = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def _length(lengths, cell, seq, HAS_LENGTHS: tl.constexpr):
    length = tl.cast(seq, tl.int32)  # Triton passes a seq of 1 as a constant
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths + cell).to(tl.int32), 0), seq)
    return length


@triton.jit
def _position(step, length, reverse):
    """Where a step lies in the sequence: from the start, or from the cell's own end."""
    return tl.where(reverse, length - 1 - step, step)


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
    delta = delta + bias
    if SOFTPLUS:
        delta = _softplus(delta)
    return delta


# ----------------------------------------------------------------------------------------------------------------------
# Scan
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _scan_forward_kernel(
    u0,
    u1,
    delta0,
    delta1,
    A0,
    A1,
    B0,
    B1,
    C0,
    C1,
    D0,
    D1,
    z0,
    z1,
    bias0,
    bias1,
    lengths,
    y,
    last_state,
    boundaries,
    cells,
    seq,
    channels,
    states,
    u_batch,
    u_step,
    delta_batch,
    delta_step,
    z_batch,
    z_step,
    B_batch,
    B_step,
    C_batch,
    C_step,
    REVERSE0: tl.constexpr,
    REVERSE1: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    KEEP: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    cell, direction = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    in_c, in_n = c < channels, n < states
    in_nc = in_n[:, None] & in_c[None, :]
    wide_cell = cell.to(tl.int64)
    sequence = direction.to(tl.int64) * cells + wide_cell  # row of the outputs, which hold both directions
    u = _pick(direction, u0, u1) + wide_cell * u_batch
    delta = _pick(direction, delta0, delta1) + wide_cell * delta_batch
    B = _pick(direction, B0, B1) + wide_cell * B_batch
    C = _pick(direction, C0, C1) + wide_cell * C_batch
    y += sequence * seq * channels
    A = _load(_pick(direction, A0, A1), c[None, :] * states + n[:, None], in_nc)
    D = tl.zeros([CHANNELS], tl.float32)
    if HAS_D:
        D = _load(_pick(direction, D0, D1), c, in_c)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias = _load(_pick(direction, bias0, bias1), c, in_c)
    z = u
    if HAS_Z:
        z = _pick(direction, z0, z1) + wide_cell * z_batch
    reverse = tl.where(direction == 0, REVERSE0, REVERSE1) != 0
    length = _length(lengths, cell, seq, HAS_LENGTHS)

    # What the first step reads; each later one is read a step ahead, and the last one twice.
    last = tl.maximum(length - 1, 0)
    t = tl.where(reverse, last, 0)
    next_u = _load(u, t * u_step + c, in_c)
    next_delta = _load(delta, t * delta_step + c, in_c)
    next_B = _load(B, t * B_step + n, in_n)
    next_C = _load(C, t * C_step + n, in_n)
    next_z = next_u
    if HAS_Z:
        next_z = _load(z, t * z_step + c, in_c)

    state = tl.zeros([STATES, CHANNELS], tl.float32)
    blocks = tl.cdiv(seq, STEPS)
    for step in range(length):
        if KEEP:  # noqa: SIM102 (known when compiling, unlike what follows)
            if step % STEPS == 0:
                row = (sequence * blocks + step // STEPS) * states
                tl.store(boundaries + (row + n[:, None]) * channels + c[None, :], state, mask=in_nc)
        here = t
        u_t, delta_t, B_t, C_t, z_t = next_u, next_delta, next_B, next_C, next_z
        t = _position(tl.minimum(step + 1, last), length, reverse)
        next_u = _load(u, t * u_step + c, in_c)
        next_delta = _load(delta, t * delta_step + c, in_c)
        next_B = _load(B, t * B_step + n, in_n)
        next_C = _load(C, t * C_step + n, in_n)
        if HAS_Z:
            next_z = _load(z, t * z_step + c, in_c)

        delta_t = _step_size(delta_t, bias, SOFTPLUS)
        state = tl.exp(delta_t[None, :] * A) * state + (delta_t * u_t)[None, :] * B_t[:, None]
        output = tl.sum(state * C_t[:, None], axis=0) + D * u_t
        if HAS_Z:
            output = output * z_t * _sigmoid(z_t)
        tl.store(y + here * channels + c, output.to(y.dtype.element_ty), mask=in_c)

    for step in range(length, seq):
        tl.store(y + step * channels + c, tl.zeros([CHANNELS], y.dtype.element_ty), mask=in_c)
    tl.store(last_state + (sequence * states + n[:, None]) * channels + c[None, :], state, mask=in_nc)


@triton.jit
def _scan_backward_kernel(
    grad_y,
    grad_last_state,
    u0,
    u1,
    delta0,
    delta1,
    A0,
    A1,
    B0,
    B1,
    C0,
    C1,
    D0,
    D1,
    z0,
    z1,
    bias0,
    bias1,
    lengths,
    boundaries,
    scratch,
    grad_u,
    grad_delta,
    grad_z,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
    grad_bias,
    cells,
    seq,
    channels,
    states,
    u_batch,
    u_step,
    delta_batch,
    delta_step,
    z_batch,
    z_step,
    B_batch,
    B_step,
    C_batch,
    C_step,
    REVERSE0: tl.constexpr,
    REVERSE1: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    cell, block_of_channels, direction = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block_of_channels * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    in_c, in_n = c < channels, n < states
    in_nc = in_n[:, None] & in_c[None, :]
    wide_cell = cell.to(tl.int64)
    sequence = direction.to(tl.int64) * cells + wide_cell
    sequences = tl.num_programs(2).to(tl.int64) * cells
    u = _pick(direction, u0, u1) + wide_cell * u_batch
    delta = _pick(direction, delta0, delta1) + wide_cell * delta_batch
    B = _pick(direction, B0, B1) + wide_cell * B_batch
    C = _pick(direction, C0, C1) + wide_cell * C_batch
    grad_y += sequence * seq * channels
    grad_u += sequence * seq * channels
    grad_delta += sequence * seq * channels
    grad_z += sequence * seq * channels
    # Sums over this block of channels alone.
    grad_B += (block_of_channels * sequences + sequence) * seq * states
    grad_C += (block_of_channels * sequences + sequence) * seq * states
    A = _load(_pick(direction, A0, A1), c[None, :] * states + n[:, None], in_nc)
    D = tl.zeros([CHANNELS], tl.float32)
    if HAS_D:
        D = _load(_pick(direction, D0, D1), c, in_c)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias = _load(_pick(direction, bias0, bias1), c, in_c)
    z = u
    if HAS_Z:
        z = _pick(direction, z0, z1) + wide_cell * z_batch
    reverse = tl.where(direction == 0, REVERSE0, REVERSE1) != 0
    length = _length(lengths, cell, seq, HAS_LENGTHS)

    of_state = n[:, None] * channels + c[None, :]
    grad_state = _load(grad_last_state, sequence * states * channels + of_state, in_nc)
    sum_A = tl.zeros([STATES, CHANNELS], tl.float32)
    sum_D = tl.zeros([CHANNELS], tl.float32)
    sum_bias = tl.zeros([CHANNELS], tl.float32)
    blocks = tl.cdiv(seq, STEPS)
    blocks_of_cell = tl.cdiv(length, STEPS)
    scratch += sequence * STEPS * states * channels
    for turned_block in range(blocks_of_cell):
        block = blocks_of_cell - 1 - turned_block
        start = block * STEPS
        stop = tl.minimum(start + STEPS, length)
        # The states before each step of the block go through memory: other threads may read what one wrote.
        tl.debug_barrier()
        state = _load(boundaries, (sequence * blocks + block) * states * channels + of_state, in_nc)
        for step in range(start, stop):
            tl.store(scratch + (step - start) * states * channels + of_state, state, mask=in_nc)
            t = _position(step, length, reverse)
            u_t = _load(u, t * u_step + c, in_c)
            delta_t = _step_size(_load(delta, t * delta_step + c, in_c), bias, SOFTPLUS)
            B_t = _load(B, t * B_step + n, in_n)
            state = tl.exp(delta_t[None, :] * A) * state + (delta_t * u_t)[None, :] * B_t[:, None]

        tl.debug_barrier()
        for turned in range(stop - start):
            step = stop - 1 - turned
            t = _position(step, length, reverse)
            u_t = _load(u, t * u_step + c, in_c)
            raw_delta = _load(delta, t * delta_step + c, in_c)
            delta_t = _step_size(raw_delta, bias, SOFTPLUS)
            B_t = _load(B, t * B_step + n, in_n)
            C_t = _load(C, t * C_step + n, in_n)
            before = _load(scratch, (step - start) * states * channels + of_state, in_nc)
            decay = tl.exp(delta_t[None, :] * A)
            after = decay * before + (delta_t * u_t)[None, :] * B_t[:, None]
            gradient = _load(grad_y, t * channels + c, in_c)
            if HAS_Z:
                z_t = _load(z, t * z_step + c, in_c)
                gate = _sigmoid(z_t)
                output = tl.sum(after * C_t[:, None], axis=0) + D * u_t
                slope = gate * (1.0 + z_t * (1.0 - gate))  # of silu
                value = gradient * output * slope
                tl.store(grad_z + t * channels + c, value.to(grad_z.dtype.element_ty), mask=in_c)
                gradient = gradient * z_t * gate

            sum_D += gradient * u_t
            value = tl.sum(gradient[None, :] * after, axis=1)
            tl.store(grad_C + t * states + n, value, mask=in_n)
            grad_state += gradient[None, :] * C_t[:, None]
            value = tl.sum(grad_state * (delta_t * u_t)[None, :], axis=1)
            tl.store(grad_B + t * states + n, value, mask=in_n)
            grad_input = tl.sum(grad_state * B_t[:, None], axis=0)  # of delta * u
            value = grad_input * delta_t + D * gradient
            tl.store(grad_u + t * channels + c, value.to(grad_u.dtype.element_ty), mask=in_c)
            grad_state = grad_state * decay
            # The exponent is delta * A, and its exponential multiplied the state before this step.
            grad_exponent = grad_state * before
            sum_A += grad_exponent * delta_t[None, :]
            value = tl.sum(grad_exponent * A, axis=0) + grad_input * u_t
            if SOFTPLUS:
                value = value * _sigmoid(raw_delta + bias)
            sum_bias += value
            tl.store(grad_delta + t * channels + c, value.to(grad_delta.dtype.element_ty), mask=in_c)

    for step in range(length, seq):
        zeros = tl.zeros([CHANNELS], tl.float32)
        tl.store(grad_u + step * channels + c, zeros.to(grad_u.dtype.element_ty), mask=in_c)
        tl.store(grad_delta + step * channels + c, zeros.to(grad_delta.dtype.element_ty), mask=in_c)
        if HAS_Z:
            tl.store(grad_z + step * channels + c, zeros.to(grad_z.dtype.element_ty), mask=in_c)
        tl.store(grad_B + step * states + n, tl.zeros([STATES], tl.float32), mask=in_n)
        tl.store(grad_C + step * states + n, tl.zeros([STATES], tl.float32), mask=in_n)
    tl.store(grad_A + sequence * states * channels + of_state, sum_A, mask=in_nc)
    tl.store(grad_D + sequence * channels + c, sum_D, mask=in_c)
    tl.store(grad_bias + sequence * channels + c, sum_bias, mask=in_c)


# ----------------------------------------------------------------------------------------------------------------------
# Convolution
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _convolve(x, weight, bias, t, c, length, sign, x_step, channels, WIDTH: tl.constexpr):
    """The convolution at positions t, (steps, channels), before the activation; ``sign`` is 1, or -1 backwards."""
    in_c = c < channels
    value = tl.zeros([t.shape[0], c.shape[0]], tl.float32) + bias[None, :]
    for tap in tl.static_range(WIDTH):
        source = t - sign * (WIDTH - 1 - tap)
        mask = ((source >= 0) & (source < length))[:, None] & in_c[None, :]
        values = _load(x, source[:, None] * x_step + c[None, :], mask)
        value += values * _load(weight, c * WIDTH + tap, in_c)[None, :]
    return value


@triton.jit
def _conv_forward_kernel(
    x0,
    x1,
    weight0,
    weight1,
    bias0,
    bias1,
    lengths,
    y,
    cells,
    seq,
    channels,
    x_batch,
    x_step,
    REVERSE0: tl.constexpr,
    REVERSE1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    cell, direction = tl.program_id(0) % cells, tl.program_id(0) // cells
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(2) * STEPS + tl.arange(0, STEPS)
    in_c = c < channels
    wide_cell = cell.to(tl.int64)
    x = _pick(direction, x0, x1) + wide_cell * x_batch
    weight = _pick(direction, weight0, weight1)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias = _load(_pick(direction, bias0, bias1), c, in_c)
    sign = 1 - 2 * tl.where(direction == 0, REVERSE0, REVERSE1)
    length = _length(lengths, cell, seq, HAS_LENGTHS)
    value = _convolve(x, weight, bias, t, c, length, sign, x_step, channels, WIDTH)
    if SILU:
        value = value * _sigmoid(value)
    value = tl.where((t < length)[:, None], value, 0.0)
    y += (direction.to(tl.int64) * cells + wide_cell) * seq * channels
    mask = (t < seq)[:, None] & in_c[None, :]
    tl.store(y + t[:, None] * channels + c[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _conv_backward_kernel(
    grad_y,
    x0,
    x1,
    weight0,
    weight1,
    bias0,
    bias1,
    lengths,
    grad_x,
    grad_weight,
    grad_bias,
    cells,
    seq,
    channels,
    x_batch,
    x_step,
    REVERSE0: tl.constexpr,
    REVERSE1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    cell, direction = tl.program_id(0) % cells, tl.program_id(0) // cells
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    block = tl.program_id(2)
    t = block * STEPS + tl.arange(0, STEPS)
    in_c = c < channels
    wide_cell = cell.to(tl.int64)
    sequence = direction.to(tl.int64) * cells + wide_cell
    x = _pick(direction, x0, x1) + wide_cell * x_batch
    weight = _pick(direction, weight0, weight1)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias = _load(_pick(direction, bias0, bias1), c, in_c)
    sign = 1 - 2 * tl.where(direction == 0, REVERSE0, REVERSE1)
    length = _length(lengths, cell, seq, HAS_LENGTHS)
    grad_y += sequence * seq * channels
    grad_x += sequence * seq * channels

    value = tl.zeros([STEPS, CHANNELS], tl.float32)
    row = sequence * tl.num_programs(2) + block  # sums over this block of steps alone
    for tap in tl.static_range(WIDTH):
        # The outputs that this tap took from t.
        reached = t + sign * (WIDTH - 1 - tap)
        mask = ((reached >= 0) & (reached < length) & (t < length))[:, None] & in_c[None, :]
        gradient = _load(grad_y, reached[:, None] * channels + c[None, :], mask)
        if SILU:
            before = _convolve(x, weight, bias, reached, c, length, sign, x_step, channels, WIDTH)
            gate = _sigmoid(before)
            gradient = gradient * gate * (1.0 + before * (1.0 - gate))
        value += gradient * _load(weight, c * WIDTH + tap, in_c)[None, :]
        inputs = _load(x, t[:, None] * x_step + c[None, :], mask)
        tl.store(grad_weight + (row * channels + c) * WIDTH + tap, tl.sum(gradient * inputs, axis=0), mask=in_c)
        if tap == WIDTH - 1:
            tl.store(grad_bias + row * channels + c, tl.sum(gradient, axis=0), mask=in_c)
    mask = (t < seq)[:, None] & in_c[None, :]
    tl.store(grad_x + t[:, None] * channels + c[None, :], value.to(grad_x.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# From tensors to kernels
# ----------------------------------------------------------------------------------------------------------------------


def _on_device(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _both(tensors: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The tensors of both directions; an empty list stands for one that was not given."""
    return (tensors[0], tensors[-1]) if tensors else (None, None)


def _aligned(tensors: list[Tensor]) -> tuple[list[Tensor], tuple[int, int]]:
    """Sequences whose channels are neighbours, with equal strides in both directions, and those of batch and step."""
    if any(tensor.stride() != tensors[0].stride() or tensor.stride(2) != 1 for tensor in tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
    return tensors, tensors[0].stride()[:2] if tensors else (0, 0)


def _prepare(u, delta, A, B, C, D, z, delta_bias, lengths):
    """Pointers and strides in the order of the kernels, and the options that all of them take."""
    u, delta, z, B, C = (_aligned(tensors) for tensors in (u, delta, z, B, C))
    A, D, delta_bias = ([tensor.contiguous() for tensor in tensors] for tensors in (A, D, delta_bias))
    pointers = [tensor for tensors in (u[0], delta[0], A, B[0], C[0], D, z[0], delta_bias) for tensor in _both(tensors)]
    if lengths is not None:
        lengths = lengths.to(u[0][0].device).contiguous()
    strides = [stride for _, pair in (u, delta, z, B, C) for stride in pair]
    options = {
        "HAS_D": bool(D),
        "HAS_Z": bool(z[0]),
        "HAS_BIAS": bool(delta_bias),
        "HAS_LENGTHS": lengths is not None,
        "STEPS": BLOCK_STEPS,
        "STATES": triton.next_power_of_2(A[0].shape[1]),
    }
    return pointers, lengths, strides, options


def _directions(reverse: list[bool]) -> dict[str, int]:
    return {"REVERSE0": int(reverse[0]), "REVERSE1": int(reverse[-1])}


def boundaries_shape(directions, cells, seq, channels, states, keep):
    """Shape of the states before blocks of steps."""
    return directions, cells, triton.cdiv(seq, BLOCK_STEPS) * states if keep else 0, channels


def scan_forward(u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus, keep_boundaries):
    """See `selective_scan._scan_op`."""
    (cells, seq, channels), states, directions = u[0].shape, A[0].shape[1], len(u)
    y = u[0].new_empty(directions, cells, seq, channels)
    last_state = u[0].new_zeros(directions, cells, states, channels, dtype=torch.float32)
    shape = boundaries_shape(directions, cells, seq, channels, states, keep_boundaries)
    boundaries = u[0].new_empty(shape, dtype=torch.float32)
    pointers, lengths, strides, options = _prepare(u, delta, A, B, C, D, z, delta_bias, lengths)
    grid = cells, triton.cdiv(channels, _FORWARD["CHANNELS"]), directions
    if y.numel():
        with _on_device(y):
            _scan_forward_kernel[grid](
                *(*pointers, lengths, y, last_state, boundaries, cells, seq, channels, states, *strides),
                **_directions(reverse),
                **options,
                **_FORWARD,
                SOFTPLUS=delta_softplus,
                KEEP=keep_boundaries,
            )
    return y, last_state, boundaries


def scan_backward(
    grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus, boundaries
):
    """See `selective_scan._scan_backward_op`."""
    (cells, seq, channels), states, directions = u[0].shape, A[0].shape[1], len(u)
    blocks = triton.cdiv(channels, _BACKWARD["CHANNELS"])

    def empty(*shape, like=None):
        return u[0].new_empty(shape, dtype=torch.float32 if like is None else like.dtype)

    grad_u, grad_delta = (empty(directions, cells, seq, channels, like=given[0]) for given in (u, delta))
    grad_z = empty(directions, cells, seq, channels, like=z[0]) if z else grad_u
    grad_A = empty(directions, cells, states, channels).zero_()
    grad_B, grad_C = (empty(blocks, directions, cells, seq, states) for _ in range(2))
    grad_D, grad_bias = (empty(directions, cells, channels).zero_() for _ in range(2))
    scratch = empty(directions, cells, BLOCK_STEPS * states, channels)
    pointers, lengths, strides, options = _prepare(u, delta, A, B, C, D, z, delta_bias, lengths)
    grid = cells, blocks, directions
    if grad_u.numel():
        with _on_device(grad_y):
            _scan_backward_kernel[grid](
                *(grad_y.contiguous(), grad_last_state.contiguous(), *pointers, lengths, boundaries, scratch),
                *(grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias),
                *(cells, seq, channels, states, *strides),
                **_directions(reverse),
                **options,
                **_BACKWARD,
                SOFTPLUS=delta_softplus,
            )
    grad_A, grad_B, grad_C = grad_A.sum(1).transpose(1, 2), grad_B.sum(0), grad_C.sum(0)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D.sum(1), grad_z, grad_bias.sum(1)


def _prepare_conv(x, weight, bias, lengths):
    x, strides = _aligned(x)
    pointers = [
        tensor
        for tensors in (x, [w.contiguous() for w in weight], [b.contiguous() for b in bias])
        for tensor in _both(tensors)
    ]
    if lengths is not None:
        lengths = lengths.to(x[0].device).contiguous()
    options = {
        "HAS_BIAS": bool(bias),
        "HAS_LENGTHS": lengths is not None,
        "WIDTH": weight[0].shape[1],
        **_CONV,
    }
    return pointers, lengths, strides, options


def conv_forward(x, weight, bias, lengths, reverse, silu):
    """See `selective_scan._conv_op`."""
    cells, seq, channels = x[0].shape
    y = x[0].new_empty(len(x), cells, seq, channels)
    pointers, lengths, strides, options = _prepare_conv(x, weight, bias, lengths)
    grid = len(x) * cells, triton.cdiv(channels, _CONV["CHANNELS"]), triton.cdiv(seq, _CONV["STEPS"])
    if y.numel():
        with _on_device(y):
            _conv_forward_kernel[grid](
                *(*pointers, lengths, y, cells, seq, channels, *strides),
                **_directions(reverse),
                **options,
                SILU=silu,
            )
    return y


def conv_backward(grad_y, x, weight, bias, lengths, reverse, silu):
    """See `selective_scan._conv_backward_op`."""
    (cells, seq, channels), width, directions = x[0].shape, weight[0].shape[1], len(x)
    blocks = triton.cdiv(seq, _CONV["STEPS"])
    grad_x = x[0].new_empty(directions, cells, seq, channels)
    grad_weight = x[0].new_empty(directions, cells * blocks, channels, width, dtype=torch.float32)
    grad_bias = x[0].new_empty(directions, cells * blocks, channels, dtype=torch.float32)
    pointers, lengths, strides, options = _prepare_conv(x, weight, bias, lengths)
    grid = directions * cells, triton.cdiv(channels, _CONV["CHANNELS"]), blocks
    if grad_x.numel():
        with _on_device(grad_y):
            _conv_backward_kernel[grid](
                *(grad_y.contiguous(), *pointers, lengths, grad_x, grad_weight, grad_bias),
                *(cells, seq, channels, *strides),
                **_directions(reverse),
                **options,
                SILU=silu,
            )
    return grad_x, grad_weight.sum(1), grad_bias.sum(1)
