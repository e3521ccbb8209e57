# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""The selective scan and the short convolution on a CPU: compiled by Numba at first use, then cached on disk.

The scan is an exponential and two multiply-adds for each cell, step, channel and state. So what counts is that the
exponential is computed for sixteen channels at once, and that states stay in registers: loops run over vectors of
float32 that are named as such (`_Lanes`), instead of hoping that the compiler finds them. A block of `BLOCK_STEPS`
steps of sixteen channels is brought into a scratch of a few KiB; each state then walks through the block in a register.
Only the states before blocks are kept for the backward pass, which recomputes a block from them.

Work is cut by shape alone, never by the number of threads, so the same input gives the same bits on any number of them.
Sequences may be float32, or bfloat16 passed as its bits; everything is computed in float32.
"""

import functools
import math
import operator
import os
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor


try:
    import numpy as np
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic, models, overload, register_model
except ImportError as error:
    raise ImportError(
        "The backend 'numba' needs the package numba, which cannot be imported here. "
        "Install it with `pip install numba`, or leave `backend` out."
    ) from error


LANES = 16
# Steps between the states that are kept. A block's tiles and the sums of B's and C's gradients stay in the L2 cache.
BLOCK_STEPS = 64
# Channels of a unit of work: few enough to keep many threads busy, enough to reduce B's and C's gradients seldom.
_GROUP_CHANNELS = 128
# Below so many vector operations threads cost more than they bring (about 50 microseconds on one core).
_MIN_VECTORS_PER_THREAD = 2**14
_PIECES_PER_THREAD = 4


# ----------------------------------------------------------------------------------------------------------------------
# Vectors of sixteen float32. LLVM splits them where a machine's registers are shorter.
# ----------------------------------------------------------------------------------------------------------------------


class _LanesType(types.Type):
    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


_Lanes = _LanesType()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _FLOATS)


def _constant(value: int):
    return ir.Constant(_INTS, [value] * LANES)


def _element_type(kind):
    """LLVM's type of an element; bfloat16 comes as int16."""
    return ir.FloatType() if kind == types.float32 else ir.IntType(16)


def _pointer(builder, address, index, element, target):
    base = builder.inttoptr(address, element.as_pointer())
    return builder.bitcast(builder.gep(base, [index]), target.as_pointer())


def _emit_load(context, builder, element, address, index):
    vector = ir.VectorType(element, LANES)
    loaded = builder.load(_pointer(builder, address, index, element, vector))
    loaded.align = element.get_abi_size(context.target_data)
    if vector == _FLOATS:
        return loaded
    return builder.bitcast(builder.shl(builder.zext(loaded, _INTS), _constant(16)), _FLOATS)


def _emit_store(context, builder, element, address, index, value):
    if element != ir.FloatType():
        bits = builder.bitcast(value, _INTS)
        odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
        rounded = builder.add(builder.add(bits, odd), _constant(0x7FFF))
        # Rounding would carry some NaNs into infinity or zero.
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), _constant(0x7FC00000), rounded)
        value = builder.trunc(builder.lshr(rounded, _constant(16)), _SHORTS)
    stored = builder.store(value, _pointer(builder, address, index, element, value.type))
    stored.align = element.get_abi_size(context.target_data)


def _emit_transpose(builder, rows):
    """Transpose a square of vectors by exchanging halves, quarters and so on of pairs of rows."""
    rows, distance = list(rows), LANES // 2
    while distance:
        for row in range(LANES):
            if row & distance:
                continue
            above, below = rows[row], rows[row + distance]
            first = [lane + (LANES - distance if lane & distance else 0) for lane in range(LANES)]
            second = [lane + (LANES if lane & distance else distance) for lane in range(LANES)]
            rows[row], rows[row + distance] = (
                builder.shuffle_vector(above, below, ir.Constant(_INTS, lanes)) for lanes in (first, second)
            )
        distance //= 2
    return rows


@intrinsic
def _load(typingctx, kind, address, index):
    """Sixteen neighbours, widened to float32. ``kind`` is a number of the type that lies there."""
    element = _element_type(kind)

    def codegen(context, builder, signature, arguments):
        return _emit_load(context, builder, element, *arguments[1:])

    return _Lanes(kind, types.intp, types.intp), codegen


@intrinsic
def _store(typingctx, kind, address, index, value):
    """Sixteen neighbours, rounded to the nearest even where bfloat16 lies there."""
    element = _element_type(kind)

    def codegen(context, builder, signature, arguments):
        _emit_store(context, builder, element, *arguments[1:])
        return context.get_dummy_value()

    return types.none(kind, types.intp, types.intp, _Lanes), codegen


@intrinsic
def _load_square(typingctx, kind, source, source_index, source_stride, target, target_index, target_stride):
    """Sixteen rows of sixteen neighbours, transposed to float32 at ``target``; strides are those between rows."""
    element = _element_type(kind)

    def codegen(context, builder, signature, arguments):
        _, source, source_index, source_stride, target, target_index, target_stride = arguments
        rows = []
        for _ in range(LANES):
            rows.append(_emit_load(context, builder, element, source, source_index))
            source_index = builder.add(source_index, source_stride)
        for row in _emit_transpose(builder, rows):
            _emit_store(context, builder, ir.FloatType(), target, target_index, row)
            target_index = builder.add(target_index, target_stride)
        return context.get_dummy_value()

    return types.none(kind, *[types.intp] * 6), codegen


@intrinsic
def _copy(typingctx, kind, source, source_index, target, target_index):
    """One element as it is."""
    element = _element_type(kind)

    def codegen(context, builder, signature, arguments):
        _, source, source_index, target, target_index = arguments
        value = builder.load(_pointer(builder, source, source_index, element, element))
        builder.store(value, _pointer(builder, target, target_index, element, element))
        return context.get_dummy_value()

    return types.none(kind, *[types.intp] * 4), codegen


@intrinsic
def _number(typingctx, kind, address, index):
    """One float32 or int64, by the type of ``kind``."""

    def codegen(context, builder, signature, arguments):
        element = context.get_value_type(signature.return_type)
        return builder.load(_pointer(builder, arguments[1], arguments[2], element, element))

    return kind(kind, types.intp, types.intp), codegen


@intrinsic
def _set_number(typingctx, address, index, value):
    """Store one float32."""

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[2], _pointer(builder, *arguments[:2], ir.FloatType(), ir.FloatType()))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.float32), codegen


@intrinsic
def _splat(typingctx, number):
    """One float32 in every lane."""

    def codegen(context, builder, signature, arguments):
        empty = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(empty, arguments[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, _constant(0))

    return _Lanes(types.float32), codegen


@intrinsic
def _fma(typingctx, a, b, c):
    """``a * b + c``, in one instruction where the machine has it."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return builder.call(function, arguments)

    return _Lanes(_Lanes, _Lanes, _Lanes), codegen


@intrinsic
def _lane_sum(typingctx, value):
    """Sum of the lanes, in pairs: one order, so the same bits every time."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(function, [ir.Constant(ir.FloatType(), 0.0), *arguments], fastmath=("reassoc",))

    return types.float32(_Lanes), codegen


@intrinsic
def _times_power_of_two(typingctx, value, shifted):
    """``value`` times two to the power that lies in the low bits of ``shifted``: an addition to the exponents."""

    def codegen(context, builder, signature, arguments):
        bits, power = (builder.bitcast(argument, _INTS) for argument in arguments)
        return builder.bitcast(builder.add(bits, builder.shl(power, _constant(23))), _FLOATS)

    return _Lanes(_Lanes, _Lanes), codegen


def _binary(emit):
    @intrinsic
    def function(typingctx, a, b):
        return _Lanes(_Lanes, _Lanes), lambda context, builder, signature, arguments: emit(builder, *arguments)

    return function


_add = _binary(lambda builder, a, b: builder.fadd(a, b))
_subtract = _binary(lambda builder, a, b: builder.fsub(a, b))
_multiply = _binary(lambda builder, a, b: builder.fmul(a, b))
_divide = _binary(lambda builder, a, b: builder.fdiv(a, b))
# A NaN in the first argument stays.
_maximum = _binary(lambda builder, a, b: builder.select(builder.fcmp_unordered(">", a, b), a, b))
_minimum = _binary(lambda builder, a, b: builder.select(builder.fcmp_unordered("<", a, b), a, b))


def _overload(symbol, function):
    @overload(symbol)
    def typed(a, b):
        if a is _Lanes and b is _Lanes:
            return lambda a, b: function(a, b)
        return None


for _symbol, _function in {"add": _add, "sub": _subtract, "mul": _multiply, "truediv": _divide}.items():
    _overload(getattr(operator, _symbol), _function)


# ----------------------------------------------------------------------------------------------------------------------
# Functions of vectors
# ----------------------------------------------------------------------------------------------------------------------

_OPTIONS = {"nogil": True, "error_model": "numpy"}
_inline = njit(forceinline=True, **_OPTIONS)
_function = njit(**_OPTIONS)  # too long to be compiled anew at every call


def _kernel(function):
    """Compile at first use, cached on disk where a folder for it can be written."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # numba finds neither the file's folder nor the user's cache writable
        return njit(**_OPTIONS)(function)


_F32, _I64 = np.float32(0), np.int64(0)
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_LOG2E = np.float32(math.log2(math.e))
# Added and subtracted, it rounds to a whole number, which the sum then holds in its low bits: 1.5 * 2**23.
_ROUND = np.float32(12582912.0)
# Here the sum of exponents makes 0 and infinity. Below -126, where float32 loses precision, results are merely tiny.
_LOWEST, _HIGHEST = np.float32(-127), np.float32(128)
# 2**x = 1 + x (c1 + x (c2 + ...)) on [-1/2, 1/2], least largest relative error with a value of 1 at 0: 9e-8. The exact
# 1 matters, as small steps multiply many decays near 1. Found by weighted least squares with iterated weights.
_EXP2 = tuple(np.float32(c) for c in (0.693147004, 0.240222424, 0.0555073358, 0.00967151299, 0.00132647273))
# log(1 + e) = 2 artanh(s) with s = e / (2 + e), at most 1/3: terms up to s**17 leave 1e-9.
_ARTANH = tuple(np.float32(1 / k) for k in range(15, 0, -2))
_ARTANH_FIRST = np.float32(1 / 17)


@_inline
def _exp2(x):
    """Two to the power of x; 0 and infinity beyond what float32 can hold."""
    x = _minimum(_maximum(x, _splat(_LOWEST)), _splat(_HIGHEST))
    rounded = x + _splat(_ROUND)
    rest = x - (rounded - _splat(_ROUND))
    value = _fma(_splat(_EXP2[4]), rest, _splat(_EXP2[3]))
    value = _fma(value, rest, _splat(_EXP2[2]))
    value = _fma(value, rest, _splat(_EXP2[1]))
    value = _fma(value, rest, _splat(_EXP2[0]))
    value = _fma(value, rest, _splat(_ONE))
    return _times_power_of_two(value, rounded)


@_inline
def _sigmoid(x):
    return _splat(_ONE) / (_splat(_ONE) + _exp2(x * _splat(-_LOG2E)))


@_inline
def _silu_slope(x):
    gate = _sigmoid(x)
    return gate * (_splat(_ONE) + x * (_splat(_ONE) - gate))


@_inline
def _softplus(x):
    """``log(1 + exp(x))`` without overflow, exact to rounding for very negative x too."""
    positive = _maximum(x, _splat(_ZERO))
    small = _exp2(_splat(-_LOG2E) * _maximum(x, _splat(_ZERO) - x))  # exp(-|x|)
    s = small / (_splat(_TWO) + small)
    square = s * s
    series = _splat(_ARTANH_FIRST)
    for coefficient in _ARTANH:
        series = _fma(series, square, _splat(coefficient))
    return positive + _splat(_TWO) * s * series


# ----------------------------------------------------------------------------------------------------------------------
# Sequences and scratch
# ----------------------------------------------------------------------------------------------------------------------

# A tensor (batch, seq, channels): its address, 0 where it was not given, and its strides in elements.
_Sequence = namedtuple("_Sequence", ["address", "batch", "step", "channel"])
_NONE = _Sequence(0, 0, 0, 0)


@_inline
def _tile(scratch, offset):
    """Address of a part of the scratch. A variable: Numba compiles a function anew for every constant it is given."""
    return scratch + 4 * offset


@_inline
def _get(scratch, index):
    return _load(_F32, scratch, index)


@_inline
def _set(scratch, index, value):
    _store(_F32, scratch, index, value)


@_inline
def _read(kind, sequence, cell, t, channel, lanes, scratch):
    """Channels of one step, zeros in the lanes beyond ``lanes``; the first sixteen floats of ``scratch`` are used."""
    index = cell * sequence.batch + t * sequence.step + channel * sequence.channel
    if sequence.channel == 1 and lanes == LANES:
        return _load(kind, sequence.address, index)
    _set(scratch, 0, _splat(_ZERO))
    for lane in range(lanes):
        _copy(kind, sequence.address, index + lane * sequence.channel, scratch, lane)
    return _load(kind, scratch, 0)


@_inline
def _write(kind, sequence, cell, t, channel, lanes, scratch, value):
    index = cell * sequence.batch + t * sequence.step + channel * sequence.channel
    if sequence.channel == 1 and lanes == LANES:
        _store(kind, sequence.address, index, value)
    else:
        _store(kind, scratch, 0, value)
        for lane in range(lanes):
            _copy(kind, scratch, lane, sequence.address, index + lane * sequence.channel)


@_inline
def _broadcast(sequence, cell, t, channel):
    """One float32 of a sequence in every lane."""
    index = cell * sequence.batch + t * sequence.step + channel * sequence.channel
    return _splat(_number(_F32, sequence.address, index))


@_inline
def _put(sequence, cell, t, channel, value):
    """Store one float32 of a sequence."""
    index = cell * sequence.batch + t * sequence.step + channel * sequence.channel
    _set_number(sequence.address, index, value)


@_inline
def _length(lengths, cell, seq):
    """A cell's own length; the whole sequence where no lengths were given."""
    if lengths == 0:
        return seq
    return min(max(_number(_I64, lengths, cell), 0), seq)


@_inline
def _position(step, length, reverse):
    """Where a step lies in the sequence: from the start, or from the cell's own end."""
    return length - 1 - step if reverse else step


@_inline
def _ceil_div(a, b):
    return (a + b - 1) // b


@_function
def _stage(kind, sequence, cell, start, steps, length, reverse, channel, lanes, tile):
    """Where steps are neighbours in memory, not channels: transpose squares of sixteen of them to the address ``tile``.

    Returns how many steps of the block lie there then, in the order of the scan.
    """
    staged = 0
    if sequence.address != 0 and sequence.step == 1 and sequence.channel != 1 and lanes == LANES:
        staged = steps // LANES * LANES
    for i in range(0, staged, LANES):
        t = length - LANES - start - i if reverse else start + i
        index = cell * sequence.batch + t + channel * sequence.channel
        row, stride = (i + LANES - 1, -LANES) if reverse else (i, LANES)
        _load_square(kind, sequence.address, index, sequence.channel, tile, row * LANES, stride)
    return staged


@_inline
def _fetch(kind, sequence, cell, t, channel, lanes, i, staged, tile, scratch):
    """Step i of a block: from the address ``tile`` if it was staged there, else from where it lies."""
    if i < staged:
        return _get(tile, i * LANES)
    return _read(kind, sequence, cell, t, channel, lanes, scratch)


# ----------------------------------------------------------------------------------------------------------------------
# Scan
# ----------------------------------------------------------------------------------------------------------------------

# B and C have states for channels. A and the states are sequences with states for steps; D and bias have one step.
_Scan = namedtuple(
    "_Scan",
    ["cells", "seq", "channels", "states", "reverse", "softplus", "lengths"]
    + ["u", "delta", "A", "B", "C", "D", "bias", "z", "y", "last_state", "boundaries"],
)
# Those of A, D and bias are sums over a cell, those of B and C over a group of channels: (groups * cells, seq, states).
_ScanGradients = namedtuple("_ScanGradients", ["y", "last_state", "u", "delta", "A", "B", "C", "D", "bias", "z"])
_TILE = BLOCK_STEPS * LANES
_DELTAS = LANES  # after the sixteen floats for `_read` and `_write`
_INPUTS = _DELTAS + _TILE  # delta * u
_OUTPUTS = _INPUTS + _TILE
_FORWARD_TILES = _OUTPUTS + _TILE
# Of the backward pass alone.
_GRAD_OUTPUTS = _FORWARD_TILES
_GRAD_INPUTS = _GRAD_OUTPUTS + _TILE
_GRAD_DELTAS = _GRAD_INPUTS + _TILE
_DECAYS = _GRAD_DELTAS + _TILE
_STATES = _DECAYS + _TILE  # before each step, and after the last
_U = _STATES + _TILE + LANES
_RAW_DELTAS = _U + _TILE
_GATES = _RAW_DELTAS + _TILE
_GRAD_Y = _GATES + _TILE
_BACKWARD_TILES = _GRAD_Y + _TILE


@_inline
def _vector_of(sequence, channel, lanes, scratch):
    """A parameter (channels,) from ``channel`` on; zeros where it was not given."""
    if sequence.address == 0:
        return _splat(_ZERO)
    return _read(_F32, sequence, 0, 0, channel, lanes, scratch)


@_inline
def _step_size(a, raw, bias):
    return _softplus(raw + bias) if a.softplus else raw + bias


@_inline
def _walk(a, cell, n, state, exponent, start, steps, length, keep, scratch):
    """Take state ``n`` of sixteen channels through a block, adding to the outputs; returns it after the last step.

    ``keep`` leaves the decays and the states in the scratch.
    """
    if keep:
        _set(scratch, _STATES, state)
    for i in range(steps):
        t, here = _position(start + i, length, a.reverse), i * LANES
        decay = _exp2(_get(scratch, _DELTAS + here) * exponent)
        state = _fma(decay, state, _get(scratch, _INPUTS + here) * _broadcast(a.B, cell, t, n))
        output = _fma(_broadcast(a.C, cell, t, n), state, _get(scratch, _OUTPUTS + here))
        _set(scratch, _OUTPUTS + here, output)
        if keep:
            _set(scratch, _DECAYS + here, decay)
            _set(scratch, _STATES + here + LANES, state)
    return state


@_inline
def _walk_back(a, cell, n, A, start, steps, length, grad_state, grad_A, sums_B, sums_C, scratch):
    """The way back through a block, after `_walk` kept it: gradients of everything that the recurrence read.

    ``grad_state`` is what reaches the state after the block from the steps behind it; returned is what reaches the one
    before it, and the gradient of A so far.
    """
    for i in range(steps - 1, -1, -1):
        t, here = _position(start + i, length, a.reverse), i * LANES
        grad_output = _get(scratch, _GRAD_OUTPUTS + here)
        state_after = _get(scratch, _STATES + here + LANES)
        _set(scratch, sums_C + here, _fma(grad_output, state_after, _get(scratch, sums_C + here)))
        grad_state = _fma(grad_output, _broadcast(a.C, cell, t, n), grad_state)
        value = _fma(grad_state, _get(scratch, _INPUTS + here), _get(scratch, sums_B + here))
        _set(scratch, sums_B + here, value)
        value = _fma(grad_state, _broadcast(a.B, cell, t, n), _get(scratch, _GRAD_INPUTS + here))
        _set(scratch, _GRAD_INPUTS + here, value)
        grad_state = grad_state * _get(scratch, _DECAYS + here)
        # The exponent is delta * A, and its exponential multiplied the state before this step.
        grad_exponent = grad_state * _get(scratch, _STATES + here)
        grad_A = _fma(grad_exponent, _get(scratch, _DELTAS + here), grad_A)
        _set(scratch, _GRAD_DELTAS + here, _fma(grad_exponent, A, _get(scratch, _GRAD_DELTAS + here)))
    return grad_state, grad_A


@_inline
def _scan_group(kind, a, cell, first, scratch):
    """Scan one cell's channels from ``first`` on, as many as a group has."""
    length = _length(a.lengths, cell, a.seq)
    blocks = _ceil_div(min(_GROUP_CHANNELS, a.channels - first), LANES)
    carried = _FORWARD_TILES  # states between blocks of steps
    exponents = carried + blocks * a.states * LANES
    for block in range(blocks):
        channel = first + block * LANES
        lanes = min(LANES, a.channels - channel)
        for n in range(a.states):
            here = (block * a.states + n) * LANES
            A = _read(_F32, a.A, 0, n, channel, lanes, scratch)
            _set(scratch, exponents + here, A * _splat(_LOG2E))
            _set(scratch, carried + here, _splat(_ZERO))

    for time_block in range(_ceil_div(length, BLOCK_STEPS)):
        start = time_block * BLOCK_STEPS
        steps = min(BLOCK_STEPS, length - start)
        for block in range(blocks):
            channel = first + block * LANES
            lanes = min(LANES, a.channels - channel)
            D = _vector_of(a.D, channel, lanes, scratch)
            bias = _vector_of(a.bias, channel, lanes, scratch)
            staged_u = _stage(kind, a.u, cell, start, steps, length, a.reverse, channel, lanes, _tile(scratch, _INPUTS))
            staged_delta = _stage(
                kind, a.delta, cell, start, steps, length, a.reverse, channel, lanes, _tile(scratch, _DELTAS)
            )
            for i in range(steps):
                t, here = _position(start + i, length, a.reverse), i * LANES
                u = _fetch(kind, a.u, cell, t, channel, lanes, i, staged_u, _tile(scratch, _INPUTS), scratch)
                raw = _fetch(kind, a.delta, cell, t, channel, lanes, i, staged_delta, _tile(scratch, _DELTAS), scratch)
                delta = _step_size(a, raw, bias)
                _set(scratch, _DELTAS + here, delta)
                _set(scratch, _INPUTS + here, delta * u)
                _set(scratch, _OUTPUTS + here, D * u)
            for n in range(a.states):
                here = (block * a.states + n) * LANES
                state = _get(scratch, carried + here)
                if a.boundaries.address != 0:
                    _write(_F32, a.boundaries, cell, time_block * a.states + n, channel, LANES, scratch, state)
                exponent = _get(scratch, exponents + here)
                state = _walk(a, cell, n, state, exponent, start, steps, length, False, scratch)
                _set(scratch, carried + here, state)
            staged_z = _stage(kind, a.z, cell, start, steps, length, a.reverse, channel, lanes, _tile(scratch, _INPUTS))
            for i in range(steps):
                t, here = _position(start + i, length, a.reverse), i * LANES
                y = _get(scratch, _OUTPUTS + here)
                if a.z.address != 0:
                    z = _fetch(kind, a.z, cell, t, channel, lanes, i, staged_z, _tile(scratch, _INPUTS), scratch)
                    y = y * (z * _sigmoid(z))
                _write(kind, a.y, cell, t, channel, lanes, scratch, y)

    for block in range(blocks):
        channel = first + block * LANES
        lanes = min(LANES, a.channels - channel)
        for n in range(a.states):
            state = _get(scratch, carried + (block * a.states + n) * LANES)
            _write(_F32, a.last_state, cell, n, channel, lanes, scratch, state)
        for t in range(length, a.seq):
            _write(kind, a.y, cell, t, channel, lanes, scratch, _splat(_ZERO))


@_inline
def _scan_group_back(kind, a, g, cell, first, scratch):
    """Gradients of one cell's channels from ``first`` on."""
    length = _length(a.lengths, cell, a.seq)
    blocks = _ceil_div(min(_GROUP_CHANNELS, a.channels - first), LANES)
    group = first // _GROUP_CHANNELS
    sums_B = _BACKWARD_TILES  # (states, steps, lanes), over the blocks of channels
    sums_C = sums_B + a.states * _TILE
    carried = sums_C + a.states * _TILE  # gradients of states between blocks of steps
    sums_A = carried + blocks * a.states * LANES
    sums_D = sums_A + blocks * a.states * LANES
    sums_bias = sums_D + blocks * LANES
    for block in range(blocks):
        channel = first + block * LANES
        lanes = min(LANES, a.channels - channel)
        _set(scratch, sums_D + block * LANES, _splat(_ZERO))
        _set(scratch, sums_bias + block * LANES, _splat(_ZERO))
        for n in range(a.states):
            here = (block * a.states + n) * LANES
            _set(scratch, carried + here, _read(_F32, g.last_state, cell, n, channel, lanes, scratch))
            _set(scratch, sums_A + here, _splat(_ZERO))

    for time_block in range(_ceil_div(length, BLOCK_STEPS) - 1, -1, -1):
        start = time_block * BLOCK_STEPS
        steps = min(BLOCK_STEPS, length - start)
        for index in range(sums_B, carried, LANES):
            _set(scratch, index, _splat(_ZERO))

        for block in range(blocks):
            channel = first + block * LANES
            lanes = min(LANES, a.channels - channel)
            D = _vector_of(a.D, channel, lanes, scratch)
            bias = _vector_of(a.bias, channel, lanes, scratch)
            grad_D = _get(scratch, sums_D + block * LANES)
            staged_u = _stage(kind, a.u, cell, start, steps, length, a.reverse, channel, lanes, _tile(scratch, _U))
            staged_delta = _stage(
                kind, a.delta, cell, start, steps, length, a.reverse, channel, lanes, _tile(scratch, _RAW_DELTAS)
            )
            staged_y = _stage(kind, g.y, cell, start, steps, length, a.reverse, channel, lanes, _tile(scratch, _GRAD_Y))
            staged_z = _stage(kind, a.z, cell, start, steps, length, a.reverse, channel, lanes, _tile(scratch, _GATES))
            for i in range(steps):
                t, here = _position(start + i, length, a.reverse), i * LANES
                u = _fetch(kind, a.u, cell, t, channel, lanes, i, staged_u, _tile(scratch, _U), scratch)
                raw = _fetch(
                    kind, a.delta, cell, t, channel, lanes, i, staged_delta, _tile(scratch, _RAW_DELTAS), scratch
                )
                delta = _step_size(a, raw, bias)
                grad_output = _fetch(kind, g.y, cell, t, channel, lanes, i, staged_y, _tile(scratch, _GRAD_Y), scratch)
                if a.z.address != 0:
                    z = _fetch(kind, a.z, cell, t, channel, lanes, i, staged_z, _tile(scratch, _GATES), scratch)
                    grad_output = grad_output * (z * _sigmoid(z))
                grad_D = _fma(grad_output, u, grad_D)
                _set(scratch, _DELTAS + here, delta)
                _set(scratch, _INPUTS + here, delta * u)
                _set(scratch, _OUTPUTS + here, D * u)
                _set(scratch, _GRAD_OUTPUTS + here, grad_output)
                _set(scratch, _GRAD_INPUTS + here, _splat(_ZERO))
                _set(scratch, _GRAD_DELTAS + here, _splat(_ZERO))
            _set(scratch, sums_D + block * LANES, grad_D)

            for n in range(a.states):
                here = (block * a.states + n) * LANES
                A = _read(_F32, a.A, 0, n, channel, lanes, scratch)
                state = _read(_F32, a.boundaries, cell, time_block * a.states + n, channel, LANES, scratch)
                _walk(a, cell, n, state, A * _splat(_LOG2E), start, steps, length, True, scratch)
                grad_state, grad_A = _walk_back(
                    a,
                    cell,
                    n,
                    A,
                    start,
                    steps,
                    length,
                    _get(scratch, carried + here),
                    _get(scratch, sums_A + here),
                    sums_B + n * _TILE,
                    sums_C + n * _TILE,
                    scratch,
                )
                _set(scratch, carried + here, grad_state)
                _set(scratch, sums_A + here, grad_A)

            grad_bias = _get(scratch, sums_bias + block * LANES)
            for i in range(steps):
                t, here = _position(start + i, length, a.reverse), i * LANES
                u = _fetch(kind, a.u, cell, t, channel, lanes, i, staged_u, _tile(scratch, _U), scratch)
                grad_input = _get(scratch, _GRAD_INPUTS + here)
                grad_u = _fma(grad_input, _get(scratch, _DELTAS + here), D * _get(scratch, _GRAD_OUTPUTS + here))
                _write(kind, g.u, cell, t, channel, lanes, scratch, grad_u)
                grad_delta = _fma(grad_input, u, _get(scratch, _GRAD_DELTAS + here))
                if a.softplus:
                    raw = _fetch(
                        kind, a.delta, cell, t, channel, lanes, i, staged_delta, _tile(scratch, _RAW_DELTAS), scratch
                    )
                    grad_delta = grad_delta * _sigmoid(raw + bias)
                grad_bias = grad_bias + grad_delta
                _write(kind, g.delta, cell, t, channel, lanes, scratch, grad_delta)
                if a.z.address != 0:
                    z = _fetch(kind, a.z, cell, t, channel, lanes, i, staged_z, _tile(scratch, _GATES), scratch)
                    grad_y = _fetch(kind, g.y, cell, t, channel, lanes, i, staged_y, _tile(scratch, _GRAD_Y), scratch)
                    grad_z = grad_y * _get(scratch, _OUTPUTS + here) * _silu_slope(z)
                    _write(kind, g.z, cell, t, channel, lanes, scratch, grad_z)
            _set(scratch, sums_bias + block * LANES, grad_bias)

        for i in range(steps):
            t = _position(start + i, length, a.reverse)
            for n in range(a.states):
                here = n * _TILE + i * LANES
                _put(g.B, group * a.cells + cell, t, n, _lane_sum(_get(scratch, sums_B + here)))
                _put(g.C, group * a.cells + cell, t, n, _lane_sum(_get(scratch, sums_C + here)))

    for block in range(blocks):
        channel = first + block * LANES
        lanes = min(LANES, a.channels - channel)
        _write(_F32, g.D, cell, 0, channel, lanes, scratch, _get(scratch, sums_D + block * LANES))
        _write(_F32, g.bias, cell, 0, channel, lanes, scratch, _get(scratch, sums_bias + block * LANES))
        for n in range(a.states):
            grad_A = _get(scratch, sums_A + (block * a.states + n) * LANES)
            _write(_F32, g.A, cell, n, channel, lanes, scratch, grad_A)
        for t in range(length, a.seq):
            _write(kind, g.u, cell, t, channel, lanes, scratch, _splat(_ZERO))
            _write(kind, g.delta, cell, t, channel, lanes, scratch, _splat(_ZERO))
            if a.z.address != 0:
                _write(kind, g.z, cell, t, channel, lanes, scratch, _splat(_ZERO))
    for t in range(length, a.seq):
        for n in range(a.states):
            _put(g.B, group * a.cells + cell, t, n, _ZERO)
            _put(g.C, group * a.cells + cell, t, n, _ZERO)


@_kernel
def _scan_forward(kind, a, items, stop, scratch):
    """The groups of channels from ``items`` to ``stop``, counted cell after cell."""
    groups = _ceil_div(a.channels, _GROUP_CHANNELS)
    for item in range(items, stop):
        _scan_group(kind, a, item // groups, item % groups * _GROUP_CHANNELS, scratch)


@_kernel
def _scan_backward(kind, a, g, items, stop, scratch):
    groups = _ceil_div(a.channels, _GROUP_CHANNELS)
    for item in range(items, stop):
        _scan_group_back(kind, a, g, item // groups, item % groups * _GROUP_CHANNELS, scratch)


# ----------------------------------------------------------------------------------------------------------------------
# Convolution
# ----------------------------------------------------------------------------------------------------------------------

# The weight is a sequence with taps for steps, the last of them for the step itself.
_Conv = namedtuple("_Conv", ["seq", "channels", "width", "reverse", "silu", "lengths", "x", "weight", "bias", "y"])
_ConvGradients = namedtuple("_ConvGradients", ["y", "x", "weight", "bias"])


@_inline
def _convolve(kind, a, cell, step, length, channel, lanes, bias, weights, scratch):
    """One step before the activation; taps before the cell's first step read zeros."""
    value = bias
    for tap in range(max(0, a.width - 1 - step), a.width):
        t = _position(step - (a.width - 1 - tap), length, a.reverse)
        x = _read(kind, a.x, cell, t, channel, lanes, scratch)
        value = _fma(_get(scratch, weights + tap * LANES), x, value)
    return value


@_kernel
def _conv_forward(kind, a, items, stop, scratch):
    """Blocks of steps from ``items`` to ``stop``, counted cell after cell; rows of all channels, as they lie."""
    blocks = _ceil_div(a.seq, BLOCK_STEPS)
    bias = LANES
    weights = bias + _ceil_div(a.channels, LANES) * LANES
    for channel in range(0, a.channels, LANES):
        lanes = min(LANES, a.channels - channel)
        _set(scratch, bias + channel, _vector_of(a.bias, channel, lanes, scratch))
        for tap in range(a.width):
            weight = _read(_F32, a.weight, 0, tap, channel, lanes, scratch)
            _set(scratch, weights + channel * a.width + tap * LANES, weight)
    for item in range(items, stop):
        cell, start = item // blocks, item % blocks * BLOCK_STEPS
        length = _length(a.lengths, cell, a.seq)
        for step in range(start, min(start + BLOCK_STEPS, a.seq)):
            t = _position(step, length, a.reverse) if step < length else step
            for channel in range(0, a.channels, LANES):
                lanes = min(LANES, a.channels - channel)
                value = _splat(_ZERO)
                if step < length:
                    here = weights + channel * a.width
                    value = _get(scratch, bias + channel)
                    value = _convolve(kind, a, cell, step, length, channel, lanes, value, here, scratch)
                    if a.silu:
                        value = value * _sigmoid(value)
                _write(kind, a.y, cell, t, channel, lanes, scratch, value)


@_inline
def _conv_group_back(kind, a, g, cell, first, scratch):
    """Gradients of one cell's channels from ``first`` on."""
    length = _length(a.lengths, cell, a.seq)
    weights = LANES
    sums = weights + a.width * LANES  # gradients of the weight
    tile = sums + a.width * LANES  # gradients before the activation
    for channel in range(first, min(first + _GROUP_CHANNELS, a.channels), LANES):
        lanes = min(LANES, a.channels - channel)
        bias = _vector_of(a.bias, channel, lanes, scratch)
        grad_bias = _splat(_ZERO)
        for tap in range(a.width):
            _set(scratch, weights + tap * LANES, _read(_F32, a.weight, 0, tap, channel, lanes, scratch))
            _set(scratch, sums + tap * LANES, _splat(_ZERO))
        for start in range(0, length, BLOCK_STEPS):
            stop = min(start + BLOCK_STEPS, length)
            # The last steps of a block also reached the first outputs of the next.
            for step in range(start, min(stop + a.width - 1, length)):
                t = _position(step, length, a.reverse)
                gradient = _read(kind, g.y, cell, t, channel, lanes, scratch)
                if a.silu:
                    value = _convolve(kind, a, cell, step, length, channel, lanes, bias, weights, scratch)
                    gradient = gradient * _silu_slope(value)
                _set(scratch, tile + (step - start) * LANES, gradient)
                if step < stop:
                    grad_bias = grad_bias + gradient
                    for tap in range(max(0, a.width - 1 - step), a.width):
                        t = _position(step - (a.width - 1 - tap), length, a.reverse)
                        x = _read(kind, a.x, cell, t, channel, lanes, scratch)
                        here = sums + tap * LANES
                        _set(scratch, here, _fma(gradient, x, _get(scratch, here)))
            for step in range(start, stop):
                value = _splat(_ZERO)
                for tap in range(a.width):
                    reached = step + (a.width - 1 - tap)
                    if reached < length:
                        gradient = _get(scratch, tile + (reached - start) * LANES)
                        value = _fma(_get(scratch, weights + tap * LANES), gradient, value)
                t = _position(step, length, a.reverse)
                _write(kind, g.x, cell, t, channel, lanes, scratch, value)
        for t in range(length, a.seq):
            _write(kind, g.x, cell, t, channel, lanes, scratch, _splat(_ZERO))
        _write(_F32, g.bias, cell, 0, channel, lanes, scratch, grad_bias)
        for tap in range(a.width):
            _write(_F32, g.weight, cell, tap, channel, lanes, scratch, _get(scratch, sums + tap * LANES))


@_kernel
def _conv_backward(kind, a, g, items, stop, scratch):
    groups = _ceil_div(a.channels, _GROUP_CHANNELS)
    for item in range(items, stop):
        _conv_group_back(kind, a, g, item // groups, item % groups * _GROUP_CHANNELS, scratch)


# ----------------------------------------------------------------------------------------------------------------------
# From tensors to kernels
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 2), thread_name_prefix="panfoma")


if hasattr(os, "register_at_fork"):
    # The threads of a parent process are not in its child.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _run(kernel, directions: list[tuple], items: int, vectors: int, scratch_floats: int, keep: list):
    """Run a kernel over the items of each direction, on as many threads as torch uses, this one among them.

    The kernels let go of the interpreter's lock, so plain threads do. They take piece after piece, as torch's own
    threads may still be spinning on their cores for a while after its last operator. ``keep`` holds whatever owns the
    memory that the arguments give addresses of.
    """
    threads = max(1, min(torch.get_num_threads(), len(directions) * items, vectors // _MIN_VECTORS_PER_THREAD))
    piece = max(1, len(directions) * items // (threads * _PIECES_PER_THREAD)) if threads > 1 else max(1, items)
    calls = deque(
        (*arguments, start, min(start + piece, items)) for arguments in directions for start in range(0, items, piece)
    )

    def work(keep=keep):
        scratch = _empty(scratch_floats)  # aligned to 64 bytes
        while True:
            try:
                call = calls.popleft()
            except IndexError:
                return
            kernel(*call, scratch.data_ptr())

    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        calls.clear()  # after an error nobody starts another piece
        wait(helpers)
    for helper in helpers:
        helper.result()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whatever torch's default dtype is, the kernels write float32 unless they are told otherwise."""
    return torch.empty(*shape, dtype=dtype)


def _sequence(tensor: Tensor | None) -> _Sequence:
    """Where a tensor (batch, seq, channels) lies; fewer dimensions are the last of these."""
    if tensor is None:
        return _NONE
    return _Sequence(tensor.data_ptr(), *[0] * (3 - tensor.ndim), *tensor.stride())


def _kind(*sequences: Tensor | None):
    """The type of number that sequences are read as, and the dtype that they must have for it."""
    if all(tensor is None or tensor.dtype == torch.bfloat16 for tensor in sequences):
        return np.int16(0), torch.bfloat16
    return np.float32(0), torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    return _cast(tensor, torch.float32)


def _int64_address(lengths: Tensor | None) -> int:
    return 0 if lengths is None else lengths.data_ptr()


def _item(tensors: list[Tensor], index: int) -> Tensor | None:
    """The tensor of a direction; an empty list stands for one that was not given."""
    return tensors[index] if tensors else None


def _group_vectors(channels: int) -> int:
    return -(-min(channels, _GROUP_CHANNELS) // LANES)


class _ScanTensors:
    """One direction of a scan as its kernels want it; holds the tensors that the addresses belong to."""

    def __init__(self, direction, u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus):
        sequences = [_item(tensors, direction) for tensors in (u, delta, z)]
        self.kind, self.dtype = _kind(*sequences)
        self.u, self.delta, self.z = (_cast(tensor, self.dtype) for tensor in sequences)
        # States first: channels are read as vectors.
        self.A = _float(A[direction]).t().contiguous()
        self.B, self.C, self.D, self.bias = (_float(_item(tensors, direction)) for tensors in (B, C, D, delta_bias))
        self.lengths = None if lengths is None else lengths.to("cpu", torch.int64).contiguous()
        self.reverse, self.softplus = reverse[direction], delta_softplus

    def arguments(self, y=None, last_state=None, boundaries=None) -> _Scan:
        cells, seq, channels = self.u.shape
        tensors = (self.u, self.delta, self.A, self.B, self.C, self.D, self.bias, self.z, y, last_state, boundaries)
        return _Scan(
            *(cells, seq, channels, self.A.shape[0], int(self.reverse), int(self.softplus)),
            _int64_address(self.lengths),
            *map(_sequence, tensors),
        )


def scan_forward(u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus, keep_boundaries):
    """See `selective_scan._scan_op`."""
    (cells, seq, channels), states, directions = u[0].shape, A[0].shape[1], len(u)
    inputs = [
        _ScanTensors(k, u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus)
        for k in range(directions)
    ]
    y = _empty(directions, cells, seq, channels, dtype=inputs[0].dtype)
    last_state = _empty(directions, cells, states, channels)
    boundaries = _empty(boundaries_shape(directions, cells, seq, channels, states, keep_boundaries))
    calls = [
        (direction.kind, direction.arguments(y[k], last_state[k], boundaries[k] if keep_boundaries else None))
        for k, direction in enumerate(inputs)
    ]
    vectors = directions * cells * seq * -(-channels // LANES) * states
    floats = _FORWARD_TILES + 2 * _group_vectors(channels) * states * LANES
    _run(
        _scan_forward,
        calls,
        cells * -(-channels // _GROUP_CHANNELS),
        vectors,
        floats,
        [inputs, y, last_state, boundaries],
    )
    return y.to(u[0].dtype), last_state, boundaries


def boundaries_shape(directions, cells, seq, channels, states, keep):
    """Shape of the states before blocks of steps, channels filled up to whole vectors."""
    blocks = -(-seq // BLOCK_STEPS) if keep else 0
    return directions, cells, blocks * states, -(-channels // LANES) * LANES


def scan_backward(
    grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus, boundaries
):
    """See `selective_scan._scan_backward_op`."""
    (cells, seq, channels), states, directions = u[0].shape, A[0].shape[1], len(u)
    groups = -(-channels // _GROUP_CHANNELS)
    inputs = [
        _ScanTensors(k, u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus)
        for k in range(directions)
    ]
    # Cast once and kept until the kernels are done, which know addresses only.
    grad_y, grad_last_state = _cast(grad_y, inputs[0].dtype), _float(grad_last_state)
    grad_u, grad_delta, grad_z = (_empty(directions, cells, seq, channels, dtype=inputs[0].dtype) for _ in range(3))
    grad_A = _empty(directions, cells, states, channels)
    grad_B, grad_C = (_empty(directions, groups * cells, seq, states) for _ in range(2))
    grad_D, grad_bias = (_empty(directions, cells, 1, channels) for _ in range(2))
    written = grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_z
    calls = []
    for k, direction in enumerate(inputs):
        gradients = _ScanGradients(*(_sequence(tensor[k]) for tensor in (grad_y, grad_last_state, *written)))
        calls.append((direction.kind, direction.arguments(boundaries=boundaries[k]), gradients))
    vectors = 4 * directions * cells * seq * -(-channels // LANES) * states
    floats = _BACKWARD_TILES + 2 * states * _TILE + 2 * _group_vectors(channels) * (states + 1) * LANES
    _run(_scan_backward, calls, cells * groups, vectors, floats, [inputs, boundaries, grad_y, grad_last_state, written])
    grad_B, grad_C = (sums.view(directions, groups, cells, seq, states).sum(1) for sums in (grad_B, grad_C))
    grad_A, grad_D, grad_bias = grad_A.sum(1).transpose(1, 2), grad_D.sum((1, 2)), grad_bias.sum((1, 2))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias


class _ConvTensors:
    """One direction of a convolution as its kernels want it; holds the tensors that the addresses belong to."""

    def __init__(self, direction, x, weight, bias, lengths, reverse, silu):
        x = x[direction]
        self.kind, self.dtype = _kind(x)
        self.x = _cast(x, self.dtype)
        self.weight = _float(weight[direction]).t().contiguous()  # (taps, channels)
        self.bias = _float(_item(bias, direction))
        self.lengths = None if lengths is None else lengths.to("cpu", torch.int64).contiguous()
        self.reverse, self.silu = reverse[direction], silu

    def arguments(self, y=None) -> _Conv:
        _, seq, channels = self.x.shape
        return _Conv(
            *(seq, channels, self.weight.shape[0], int(self.reverse), int(self.silu)),
            _int64_address(self.lengths),
            *map(_sequence, (self.x, self.weight, self.bias, y)),
        )


def conv_forward(x, weight, bias, lengths, reverse, silu):
    """See `selective_scan._conv_op`."""
    (cells, seq, channels), width = x[0].shape, weight[0].shape[1]
    inputs = [_ConvTensors(k, x, weight, bias, lengths, reverse, silu) for k in range(len(x))]
    y = _empty(len(x), cells, seq, channels, dtype=inputs[0].dtype)
    calls = [(direction.kind, direction.arguments(y[k])) for k, direction in enumerate(inputs)]
    floats = LANES + (1 + width) * -(-channels // LANES) * LANES
    _run(_conv_forward, calls, cells * -(-seq // BLOCK_STEPS), 2 * y.numel() // LANES, floats, [inputs, y])
    return y.to(x[0].dtype)


def conv_backward(grad_y, x, weight, bias, lengths, reverse, silu):
    """See `selective_scan._conv_backward_op`."""
    (cells, seq, channels), width, directions = x[0].shape, weight[0].shape[1], len(x)
    inputs = [_ConvTensors(k, x, weight, bias, lengths, reverse, silu) for k in range(directions)]
    grad_y = _cast(grad_y, inputs[0].dtype)
    grad_x = _empty(directions, cells, seq, channels, dtype=inputs[0].dtype)
    grad_weight = _empty(directions, cells, width, channels)
    grad_bias = _empty(directions, cells, 1, channels)
    calls = []
    for k, direction in enumerate(inputs):
        gradients = _ConvGradients(*(_sequence(tensor[k]) for tensor in (grad_y, grad_x, grad_weight, grad_bias)))
        calls.append((direction.kind, direction.arguments(), gradients))
    floats = (1 + 2 * width + BLOCK_STEPS + width - 1) * LANES
    items = cells * -(-channels // _GROUP_CHANNELS)
    _run(
        _conv_backward,
        calls,
        items,
        4 * grad_x.numel() // LANES,
        floats,
        [inputs, grad_y, grad_x, grad_weight, grad_bias],
    )
    return grad_x, grad_weight.sum(1).transpose(1, 2), grad_bias.sum((1, 2))
