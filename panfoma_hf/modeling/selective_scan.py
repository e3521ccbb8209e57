# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""The selective scan of Mamba (S6) and its short convolution: one signature each, several bodies.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv 2312.00752, equations 1a-2b and algorithm 2. Per channel, with a state of size N:

    state[t] = exp(delta[t] A) * state[t-1] + delta[t] B[t] u[t]
    y[t]     = <C[t], state[t]> + D u[t]

==========  ===========================================  ==============================================
body        taken by itself                              where it lies
==========  ===========================================  ==============================================
reference   where no other is                            `reference_kernels`: plain PyTorch
numba       on a CPU, below float64                      `numba_kernels`: compiled at first use
triton      on CUDA, below float64                       `triton_kernels`: compiled at first use
mamba_ssm   on CUDA, where installed or fetched from     the package mamba-ssm, or the kernels hub with
            the kernels hub; the scan alone              `from_pretrained(..., use_kernels=True)`
==========  ===========================================  ==============================================

Beyond mamba-ssm's signature all of them take each cell's own length, and a direction: backwards, a cell is read from
its own last step to its first. The kernels of Numba and Triton do so in place; around the other two, copies are turned.
"""

import contextlib
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import use_kernel_forward_from_hub
from transformers.utils import logging

from .reference_kernels import causal_conv1d_reference, selective_scan_reference


logger = logging.get_logger(__name__)

BACKENDS = ("reference", "numba", "triton", "mamba_ssm")


class ScanInputs(NamedTuple):
    """What one direction of a scan reads; shapes as in `selective_scan_fn`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with an input-dependent linear recurrence, in mamba-ssm's layout.

    Nothing is copied if channels are neighbours in memory, as in the transpose of (batch, seq, channels).

    Parameters
    ----------
    u
        (batch, channels, seq), the input.
    delta
        (batch, channels, seq), the step sizes before bias and softplus.
    A
        (channels, states), negative for a decaying state.
    B, C
        (batch, states, seq), input and output maps.
    D
        (channels,), the skip connection.
    z
        (batch, channels, seq); the output is multiplied by ``silu(z)``.
    delta_bias
        (channels,), added to ``delta``.
    delta_softplus
        Whether to apply softplus to ``delta + delta_bias``.
    return_last_state
        Whether to return the state after the last step too.
    lengths
        (batch,) integers; steps at and beyond a cell's length are not read, and 0 is returned for them.
    reverse
        Whether to scan from each cell's own last step to its first.
    backend
        One of ``BACKENDS``, or None for the fastest one that fits.

    Returns
    -------
    (batch, channels, seq) in the dtype of ``u``; with ``return_last_state`` also
    (batch, channels, states) in float32 (float64 for float64 input).

    Raises
    ------
    ValueError
        If a shape does not fit, or the backend is not known or does not fit.
    ImportError
        If a backend is asked for and not installed.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    ((y, last_state),) = _scan_directions([inputs], lengths, [reverse], delta_softplus, return_last_state, backend)
    return (y, last_state) if return_last_state else y


def bidirectional_scan_fn(
    forward: ScanInputs,
    backward: ScanInputs,
    delta_softplus: bool = False,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan with one set of inputs forward and with another backward, together.

    Parameters
    ----------
    forward, backward
        Inputs of either direction, of the same shapes and at the same positions: nothing is turned round.
    delta_softplus, lengths, backend
        As in `selective_scan_fn`.

    Returns
    -------
    Two tensors (batch, channels, seq), as `selective_scan_fn` returns them for ``reverse`` False and True.

    Raises
    ------
    ValueError, ImportError
        As `selective_scan_fn`.
    """
    (y_forward, _), (y_backward, _) = _scan_directions(
        [forward, backward], lengths, [False, True], delta_softplus, False, backend
    )
    return y_forward, y_backward


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its last few steps, in the layout of the package causal-conv1d.

    Parameters
    ----------
    x
        (batch, channels, seq).
    weight
        (channels, width), the last column for the step itself.
    bias
        (channels,).
    activation
        None or "silu".
    lengths, reverse
        As in `selective_scan_fn`; backwards, the last steps are those that follow.
    backend
        As in `selective_scan_fn`; for "mamba_ssm", which has no convolution, what would be taken by itself.

    Returns
    -------
    (batch, channels, seq) in the dtype of ``x``, 0 beyond a cell's length.

    Raises
    ------
    ValueError
        If a shape or the activation does not fit, or the backend is not known or does not fit.
    ImportError
        If a backend is asked for and not installed.
    """
    if x.ndim != 3 or weight.ndim != 2:
        raise ValueError(
            f"`x` must be (batch, channels, seq) and `weight` (channels, width), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}. Transpose or reshape them."
        )
    batch, channels, _ = x.shape
    _check_shape("weight", weight, (channels, weight.shape[1]), f"x {tuple(x.shape)}")
    _check_shape("bias", bias, (channels,), f"x {tuple(x.shape)}")
    _check_lengths(lengths, batch)
    _check_devices({"x": x, "weight": weight, "bias": bias})
    if activation not in (None, "silu"):
        raise ValueError(f"`activation` must be None or 'silu', got {activation!r}. Apply another one afterwards.")
    # mamba-ssm has no convolution.
    chosen = _choose_backend(None if backend == "mamba_ssm" else backend, x, scan=False)
    if chosen == "reference":
        return _conv_reference(x, weight, bias, activation, lengths, reverse)
    y = _conv_op(
        [x.transpose(1, 2)], [weight], [] if bias is None else [bias], lengths, [reverse], activation == "silu", chosen
    )
    return y[0].transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Choice of a body
# ----------------------------------------------------------------------------------------------------------------------

_PACKAGES = {"numba": "numba", "triton": "triton", "mamba_ssm": "mamba-ssm"}
_REMEDIES = {
    "numba": "Install it with `pip install numba`",
    "triton": "Install it with `pip install triton`",
    "mamba_ssm": "Install it with `pip install panfoma-hf[cuda]`, load a model with `use_kernels=True`",
}


# The signature is that of Transformers' Mamba, which the kernel of the hub is checked against.
@use_kernel_forward_from_hub("selective_scan_fn")
def hub_selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    use_mambapy=False,
    use_associative_scan=False,
    **kwargs,
):
    """mamba-ssm's kernel from the kernels hub, once a model was loaded with ``use_kernels=True`` on CUDA.

    Transformers turns this function into a module where the package kernels is installed, and then its ``forward`` into
    the kernel.
    """
    raise RuntimeError("The kernel of the kernels hub was not loaded. Load a model with `use_kernels=True` on CUDA.")


def _mamba_ssm_from_hub() -> bool:
    """Whether `hub_selective_scan` has become a kernel."""
    forward = getattr(hub_selective_scan, "forward", None)
    return forward is not None and forward.__func__ is not type(hub_selective_scan).forward


def _mamba_ssm_scan():
    """The kernel of mamba-ssm, from the kernels hub or else from the package; ImportError where there is neither."""
    if _mamba_ssm_from_hub():
        return hub_selective_scan
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as kernel
    except Exception as error:  # built for another torch, it fails in many ways
        raise ImportError(f"mamba_ssm: {error}") from error
    return kernel


@functools.cache
def _import_problem(backend: str) -> str | None:
    """Why a body that needs a package cannot be imported; None if it can."""
    if importlib.util.find_spec(_PACKAGES[backend].replace("-", "_")) is None:
        return "it is not installed"
    try:
        _mamba_ssm_scan() if backend == "mamba_ssm" else _kernels(backend)
    except ImportError as error:
        return f"its import failed with: {error.__cause__ or error}"
    return None


# torch.compile cannot follow imports, and need not.
@torch.compiler.assume_constant_result
def _is_usable(backend: str) -> bool:
    if backend == "mamba_ssm" and _mamba_ssm_from_hub():
        return True
    return _import_problem(backend) is None


_forced: str | None = None


@contextlib.contextmanager
def use_scan_backend(backend: str | None):
    """Take one body wherever none is asked for by name, as in a whole model: for tests and benchmarks.

    Parameters
    ----------
    backend
        One of ``BACKENDS``; None changes nothing. Not safe across threads.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def _choose_backend(backend: str | None, tensor: Tensor, scan: bool = True) -> str:
    """Name of the body for a tensor, after checks of one that was asked for."""
    device, is_double = tensor.device.type, tensor.dtype == torch.float64
    if backend is None and not (_forced == "mamba_ssm" and not scan):
        backend = _forced
    if backend is None:
        return _fastest_backend(device, is_double, scan)
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)} or None, got {backend!r}. Leave it out.")
    if backend == "reference":
        return backend
    if not _is_usable(backend):
        raise ImportError(
            f"The backend {backend!r} needs the package {_PACKAGES[backend]}, but {_import_problem(backend)}. "
            f"{_REMEDIES[backend]}, or leave `backend` out."
        )
    wanted = "cpu" if backend == "numba" else "cuda"
    if device != wanted and not (backend == "triton" and _interprets_triton()):
        raise ValueError(
            f"The backend {backend!r} runs on {wanted.upper()} tensors, got {device}. "
            "Move them, or leave `backend` out."
        )
    if is_double:
        raise ValueError(f"The backend {backend!r} computes in float32, got float64. Take 'reference', or cast.")
    return backend


def _fastest_backend(device: str, is_double: bool, scan: bool) -> str:
    if is_double or device == "meta":
        return "reference"
    # Not yet measured against each other (docs/performance.md): whoever installed mamba-ssm wants it.
    candidates = {"cpu": ["numba"], "cuda": ["mamba_ssm", "triton"] if scan else ["triton"]}.get(device, [])
    for backend in candidates:
        if _is_usable(backend):
            return backend
    if not torch.compiler.is_compiling():
        _warn_of_the_slow_one(device, candidates)
    return "reference"


def _warn_of_the_slow_one(device: str, candidates: list[str]):
    message = f"The selective scan runs in plain PyTorch, which is correct and slow. There is no fast one for {device}."
    if candidates:
        backend = candidates[-1]
        message = (
            "The selective scan runs in plain PyTorch, which is correct and slow. The fast one needs the package "
            f"{_PACKAGES[backend]}, but {_import_problem(backend)}. {_REMEDIES[backend]}."
        )
    logger.warning_once(message)


def _interprets_triton() -> bool:
    """Whether Triton's kernels are run by its interpreter, as tests on a CPU do."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return knobs.runtime.interpret


# ----------------------------------------------------------------------------------------------------------------------
# Bodies with the signature of mamba-ssm
# ----------------------------------------------------------------------------------------------------------------------


def selective_scan_mamba_ssm(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """mamba-ssm's kernel behind the same signature. It wants one dtype for the sequence, float32 for the rest."""
    delta, B, C = (tensor.to(u.dtype) for tensor in (delta, B, C))
    A, D, delta_bias = (None if tensor is None else tensor.float() for tensor in (A, D, delta_bias))
    z = None if z is None else z.to(u.dtype)
    return _mamba_ssm_scan()(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


_PLAIN_BODIES = {"reference": selective_scan_reference, "mamba_ssm": selective_scan_mamba_ssm}


def _real_steps(lengths: Tensor, tensor: Tensor) -> Tensor:
    """(batch, 1, seq), true before each cell's length."""
    steps = torch.arange(tensor.shape[-1], device=tensor.device)
    return (steps < lengths.to(tensor.device)[:, None])[:, None]


def _turn(tensors: list[Tensor | None], lengths: Tensor | None, reverse: bool) -> list[Tensor | None]:
    """Turn each cell's first ``lengths`` steps round where ``reverse``; the others stay in place. Its own inverse."""
    if not reverse:
        return tensors
    if lengths is None:
        return [None if tensor is None else tensor.flip(-1) for tensor in tensors]
    seq, device = tensors[0].shape[-1], tensors[0].device
    steps, lengths = torch.arange(seq, device=device), lengths.to(device).clamp(0, seq)[:, None]
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)[:, None]
    return [None if tensor is None else tensor.gather(-1, order.expand_as(tensor)) for tensor in tensors]


def _hide_pads(tensors: list[Tensor | None], real: Tensor) -> list[Tensor | None]:
    return [None if tensor is None else tensor.masked_fill(~real, 0) for tensor in tensors]


def _conv_reference(x, weight, bias, activation, lengths, reverse):
    """Own lengths and directions around the reference, which knows of neither."""
    if lengths is not None:
        real = _real_steps(lengths, x)
        (x,) = _hide_pads([x], real)
    (x,) = _turn([x], lengths, reverse)
    (y,) = _turn([causal_conv1d_reference(x, weight, bias, activation)], lengths, reverse)
    return y if lengths is None else y.masked_fill(~real, 0)


def _scan_with_plain_body(body, inputs: ScanInputs, lengths, reverse, delta_softplus, return_last_state):
    """Own lengths and directions around a body that knows of neither."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    if lengths is not None:
        real = _real_steps(lengths, u)
        u, delta, B, C, z = _hide_pads([u, delta, B, C, z], real)
        # Steps of size 0 leave a state as it is; bias and softplus would make another size of them.
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        delta = F.softplus(delta) if delta_softplus else delta
        (delta,), delta_bias, delta_softplus = _hide_pads([delta], real), None, False
    u, delta, B, C, z = _turn([u, delta, B, C, z], lengths, reverse)
    result = body(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    y, last_state = result if return_last_state else (result, None)
    (y,) = _turn([y], lengths, reverse)
    return (y if lengths is None else y.masked_fill(~real, 0)), last_state


def _scan_directions(directions: list[ScanInputs], lengths, reverse, delta_softplus, return_last_state, backend):
    """Output and, where asked for, last state of each direction."""
    for inputs in directions:
        _check_scan_shapes(*inputs, lengths)
        _check_devices(inputs._asdict())
    for name, *tensors in zip(ScanInputs._fields, directions[0], directions[-1], strict=True):
        kinds = [None if tensor is None else (*tensor.shape, tensor.dtype, str(tensor.device)) for tensor in tensors]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"Both directions must have tensors of the same shapes, dtypes and devices, got for `{name}` "
                f"{kinds[0]} and {kinds[1]}. Make them alike, or scan one by one with `selective_scan_fn`."
            )
    backend = _choose_backend(backend, directions[0].u)
    if backend in _PLAIN_BODIES:
        body = _PLAIN_BODIES[backend]
        return [
            _scan_with_plain_body(body, inputs, lengths, backwards, delta_softplus, return_last_state)
            for inputs, backwards in zip(directions, reverse, strict=True)
        ]
    # Channels last, as the kernels read them.
    inputs = ScanInputs(
        *([tensor for tensor in tensors if tensor is not None] for tensors in zip(*directions, strict=True))
    )
    u, delta, B, C, z = (
        [tensor.transpose(1, 2) for tensor in tensors]
        for tensors in (inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z)
    )
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for tensors in inputs for t in tensors)
    y, last_state, _ = _scan_op(
        *(u, delta, inputs.A, B, C, inputs.D, z, inputs.delta_bias),
        *(lengths, list(reverse), delta_softplus, needs_backward, backend),
    )
    return [(y[k].transpose(1, 2), last_state[k].transpose(1, 2)) for k in range(len(directions))]


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], given: str):
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(
            f"`{name}` must have shape {shape} for {given}, got {tuple(tensor.shape)}. Transpose or reshape it."
        )


def _check_lengths(lengths: Tensor | None, batch: int):
    _check_shape("lengths", lengths, (batch,), f"a batch of {batch}")
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(
            f"`lengths` must be whole numbers, one for each cell, got {lengths.dtype}. "
            "Of a mask (batch, seq) take `mask.sum(-1)`."
        )


def _check_devices(tensors: dict[str, Tensor | None]):
    """Kernels are given addresses, so nobody else would notice."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"All tensors must be on one device, got {devices}. Move them with `.to(device)`.")


def _check_scan_shapes(u, delta, A, B, C, D, z, delta_bias, lengths):
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"`u` must be (batch, channels, seq) and `A` (channels, states), got {tuple(u.shape)} and "
            f"{tuple(A.shape)}. Transpose or reshape them."
        )
    (batch, channels, seq), states = u.shape, A.shape[1]
    expected = {
        "delta": (delta, (batch, channels, seq)),
        "A": (A, (channels, states)),
        "B": (B, (batch, states, seq)),
        "C": (C, (batch, states, seq)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, seq)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        _check_shape(name, tensor, shape, f"u {tuple(u.shape)} and A {tuple(A.shape)}")
    _check_lengths(lengths, batch)


# ----------------------------------------------------------------------------------------------------------------------
# Custom operators around the fused kernels, so that autograd and torch.compile take each of them whole.
#
# Lists hold one tensor for each direction, and none where it was not given. Sequences are (batch, seq, channels), B and
# C (batch, seq, states).
# ----------------------------------------------------------------------------------------------------------------------

# The same file may be loaded twice in a process, from the package and from a checkpoint: each needs a name of its own,
# and the name of a checkpoint's folder need not be an identifier.
_NAMESPACE = "panfoma_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]


class _Kernels(NamedTuple):
    scan_forward: Callable
    scan_backward: Callable
    boundaries_shape: Callable
    conv_forward: Callable
    conv_backward: Callable


@functools.cache
def _kernels(backend: str) -> _Kernels:
    """Compiled bodies are imported when first used: Numba takes half a second."""
    if backend == "numba":
        from .numba_kernels import boundaries_shape, conv_backward, conv_forward, scan_backward, scan_forward
    else:
        from .triton_kernels import boundaries_shape, conv_backward, conv_forward, scan_backward, scan_forward
    return _Kernels(scan_forward, scan_backward, boundaries_shape, conv_forward, conv_backward)


@torch.library.custom_op(f"{_NAMESPACE}::fused_scan", mutates_args=())
def _scan_op(
    u: list[Tensor],
    delta: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    z: list[Tensor],
    delta_bias: list[Tensor],
    lengths: Tensor | None,
    reverse: list[bool],
    delta_softplus: bool,
    keep_boundaries: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (directions, batch, seq, channels), last states (directions, batch, states, channels), and the states
    before blocks of steps that the backward pass starts from.
    """  # noqa: D205
    return _kernels(backend).scan_forward(
        u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus, keep_boundaries
    )


@_scan_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, lengths, reverse, delta_softplus, keep_boundaries, backend):
    (batch, seq, channels), states, directions = u[0].shape, A[0].shape[1], len(u)
    shape = _kernels(backend).boundaries_shape(directions, batch, seq, channels, states, keep_boundaries)
    return (
        u[0].new_empty(directions, batch, seq, channels),
        u[0].new_empty(directions, batch, states, channels, dtype=torch.float32),
        u[0].new_empty(shape, dtype=torch.float32),
    )


@torch.library.custom_op(f"{_NAMESPACE}::fused_scan_backward", mutates_args=())
def _scan_backward_op(
    grad_y: Tensor,
    grad_last_state: Tensor,
    u: list[Tensor],
    delta: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    z: list[Tensor],
    delta_bias: list[Tensor],
    lengths: Tensor | None,
    reverse: list[bool],
    delta_softplus: bool,
    boundaries: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of each list that is not empty, (directions, ...)."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    gradients = _kernels(backend).scan_backward(
        grad_y, grad_last_state, *inputs, lengths, reverse, delta_softplus, boundaries
    )
    return _as_given(inputs, gradients)


def _as_given(inputs: tuple[list[Tensor], ...], gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the tensors that were given, contiguous and in their dtypes."""
    pairs = zip(inputs, gradients, strict=True)
    return [gradient.to(tensors[0].dtype).contiguous() for tensors, gradient in pairs if tensors]


def _empty_gradients(*inputs: list[Tensor]) -> list[Tensor]:
    return [tensors[0].new_empty(len(tensors), *tensors[0].shape) for tensors in inputs if tensors]


def _split_like(inputs: list[list[Tensor]], gradients: list[Tensor]) -> list[list[Tensor]]:
    """One list for each input, empty where it was not given."""
    remaining = iter(gradients)
    return [list(next(remaining)) if tensors else [] for tensors in inputs]


@_scan_backward_op.register_fake
def _(
    grad_y,
    grad_last_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    lengths,
    reverse,
    delta_softplus,
    boundaries,
    backend,
):
    return _empty_gradients(u, delta, A, B, C, D, z, delta_bias)


def _save_tensors(ctx, lists: tuple[list[Tensor], ...], *others: Tensor | None):
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors), *others)


def _saved_tensors(ctx) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    saved = iter(ctx.saved_tensors)
    return [[next(saved) for _ in range(size)] for size in ctx.sizes], list(saved)


def _save_for_scan_backward(ctx, inputs, output):
    *lists, lengths, reverse, delta_softplus, _, backend = inputs
    _save_tensors(ctx, lists, lengths, output[2])
    ctx.options = reverse, delta_softplus, backend


def _scan_backward(ctx, grad_y, grad_last_state, _):
    lists, (lengths, boundaries) = _saved_tensors(ctx)
    reverse, delta_softplus, backend = ctx.options
    gradients = _scan_backward_op(
        grad_y, grad_last_state, *lists, lengths, reverse, delta_softplus, boundaries, backend
    )
    return *_split_like(lists, gradients), None, None, None, None, None


_scan_op.register_autograd(_scan_backward, setup_context=_save_for_scan_backward)


@torch.library.custom_op(f"{_NAMESPACE}::fused_conv", mutates_args=())
def _conv_op(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    lengths: Tensor | None,
    reverse: list[bool],
    silu: bool,
    backend: str,
) -> Tensor:
    """Outputs (directions, batch, seq, channels)."""
    return _kernels(backend).conv_forward(x, weight, bias, lengths, reverse, silu)


@_conv_op.register_fake
def _(x, weight, bias, lengths, reverse, silu, backend):
    return x[0].new_empty(len(x), *x[0].shape)


@torch.library.custom_op(f"{_NAMESPACE}::fused_conv_backward", mutates_args=())
def _conv_backward_op(
    grad_y: Tensor,
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    lengths: Tensor | None,
    reverse: list[bool],
    silu: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of each list that is not empty, (directions, ...)."""
    gradients = _kernels(backend).conv_backward(grad_y, x, weight, bias, lengths, reverse, silu)
    return _as_given((x, weight, bias), gradients)


@_conv_backward_op.register_fake
def _(grad_y, x, weight, bias, lengths, reverse, silu, backend):
    return _empty_gradients(x, weight, bias)


def _save_for_conv_backward(ctx, inputs, output):
    *lists, lengths, reverse, silu, backend = inputs
    _save_tensors(ctx, lists, lengths)
    ctx.options = reverse, silu, backend


def _conv_backward(ctx, grad_y):
    lists, (lengths,) = _saved_tensors(ctx)
    gradients = _conv_backward_op(grad_y, *lists, lengths, *ctx.options)
    return *_split_like(lists, gradients), None, None, None, None


_conv_op.register_autograd(_conv_backward, setup_context=_save_for_conv_backward)

__all__ = [
    "BACKENDS",
    "ScanInputs",
    "bidirectional_scan_fn",
    "causal_conv1d_fn",
    "hub_selective_scan",
    "selective_scan_fn",
    "use_scan_backend",
]
