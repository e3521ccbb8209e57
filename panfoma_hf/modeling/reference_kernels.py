# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""The selective scan and the short convolution in plain PyTorch: any device, any dtype, states in float32 or wider.

The twins that every other body is tested against, and what runs where no other does.
"""

import contextlib
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor


# Steps of a block: the states before each block are all that a forward pass keeps.
_BLOCK_STEPS = 64
# Elements of (steps, cells, channels, states) at a time. On a CPU 2**20 floats are 4 MiB, so that the few tensors of a
# block stay in the cache (docs/log.md); elsewhere only memory bounds them.
_BLOCK_ELEMENTS = {"cpu": 2**20, "other": 2**25}


def selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """The plain PyTorch body of `selective_scan_fn`; the twin that every other body is tested against."""
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    u_wide, delta, A, B, C = (tensor.to(state_dtype) for tensor in (u, delta, A, B, C))
    # Contiguous, as torch 2.13 gives softplus's backward other strides when it traces than when it runs.
    delta = delta.contiguous()
    if delta_bias is not None:
        delta = delta + delta_bias.to(state_dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    y, last_state, _ = _scan_op(u_wide, delta, A, B, C)

    if D is not None:
        y = y + u_wide * D.to(state_dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(state_dtype))
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


def _without_autocast(device: torch.device):
    """Matrix products and convolutions of what was widened on purpose stay wide."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def causal_conv1d_reference(x, weight, bias=None, activation=None):
    """The plain PyTorch body of `causal_conv1d_fn`, for sequences that run forward to their common end."""
    if x.shape[-1] == 0:
        return x.clone()  # torch refuses to convolve nothing
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    width, channels = weight.shape[1], weight.shape[0]
    with _without_autocast(x.device):
        y = F.conv1d(F.pad(x.to(wide), (width - 1, 0)), weight.to(wide)[:, None], bias, groups=channels)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Autograd through a loop over the sequence would keep every step's tensors and call a dozen operators a step. Here one
# block of steps is vectorised at a time, the loop itself is one multiply-add a step, only the states between blocks are
# kept, and the backward pass recomputes a block from the state before it. It is a custom operator so that torch.compile
# takes it whole instead of unrolling thousands of steps.
# ----------------------------------------------------------------------------------------------------------------------

# The same file may be loaded twice in a process, from the package and from a checkpoint: each needs a name of its own,
# and the name of a checkpoint's folder need not be an identifier.
_NAMESPACE = "panfoma_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]


def _tiles(u: Tensor, A: Tensor) -> range:
    """Starts of the groups of cells that are scanned together; the range's step is their size."""
    elements = _BLOCK_ELEMENTS["cpu" if u.device.type == "cpu" else "other"]
    size = max(1, elements // max(1, _BLOCK_STEPS * A.numel()))
    return range(0, u.shape[0], size)


def _num_blocks(seq: int) -> int:
    return -(-seq // _BLOCK_STEPS)


def _steps_first(*tensors: Tensor) -> list[Tensor]:
    """(batch, any, seq) to contiguous (seq, batch, any), so that a step and a block are slices without strides."""
    return [tensor.permute(2, 0, 1).contiguous() for tensor in tensors]


def _block_terms(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and input of each step of a block, both (steps, batch, channels, states)."""
    decay = (delta[..., None] * A).exp_()
    inputs = (delta * u)[..., None] * B[:, :, None]
    return decay, inputs


def _block_states(decay: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    """States after each step of a block, (steps, batch, channels, states); takes the memory of ``inputs``."""
    for step in range(decay.shape[0]):
        state = inputs[step].addcmul_(decay[step], state)
    return inputs


@torch.library.custom_op(f"{_NAMESPACE}::scan", mutates_args=())
def _scan_op(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence alone: outputs, the last state, and the states (blocks, batch, channels, states) before blocks."""
    batch, channels, seq = u.shape
    y = u.new_empty(batch, channels, seq)
    last_state = u.new_zeros(batch, channels, A.shape[1])
    boundaries = u.new_empty(_num_blocks(seq), *last_state.shape)
    tiles = _tiles(u, A)
    for start in tiles:
        cells = slice(start, start + tiles.step)
        with _without_autocast(u.device):
            _scan_tile(u[cells], delta[cells], A, B[cells], C[cells], y[cells], last_state[cells], boundaries[:, cells])
    return y, last_state, boundaries


def _scan_tile(u, delta, A, B, C, y, state, boundaries):
    """Scan some cells, writing into the last three arguments; ``state`` starts as zeros."""
    u, delta, B, C = _steps_first(u, delta, B, C)
    outputs = torch.empty_like(u)
    for index in range(len(boundaries)):
        boundaries[index] = state
        block = slice(index * _BLOCK_STEPS, (index + 1) * _BLOCK_STEPS)
        states = _block_states(*_block_terms(u[block], delta[block], A, B[block]), state)
        outputs[block] = (states @ C[block, ..., None]).squeeze(-1)
        state.copy_(states[-1])
    y.copy_(outputs.permute(1, 2, 0))


@_scan_op.register_fake
def _(u, delta, A, B, C):
    batch, channels, seq = u.shape
    states = A.shape[1]
    return (
        u.new_empty(batch, channels, seq),
        u.new_empty(batch, channels, states),
        u.new_empty(_num_blocks(seq), batch, channels, states),
    )


@torch.library.custom_op(f"{_NAMESPACE}::scan_backward", mutates_args=())
def _scan_backward_op(
    grad_y: Tensor, grad_state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, boundaries: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C."""
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (u, delta, B, C)]
    grad_A = torch.zeros_like(A)
    tiles = _tiles(u, A)
    for start in tiles:
        cells = slice(start, start + tiles.step)
        with _without_autocast(u.device):
            *tile_grads, tile_grad_A = _scan_tile_backward(
                grad_y[cells], grad_state[cells], u[cells], delta[cells], A, B[cells], C[cells], boundaries[:, cells]
            )
        grad_A += tile_grad_A
        for grad, tile_grad in zip(grads, tile_grads, strict=True):
            grad[cells] = tile_grad.permute(1, 2, 0)
    grad_u, grad_delta, grad_B, grad_C = grads
    return grad_u, grad_delta, grad_A, grad_B, grad_C


def _scan_tile_backward(grad_y, grad_state, u, delta, A, B, C, boundaries):
    """Gradients of u, delta, B and C, steps first, and of A; walks the blocks from the last to the first."""
    u, delta, B, C, grad_y = _steps_first(u, delta, B, C, grad_y)
    grad_u, grad_delta, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (u, delta, B, C))
    grad_A = torch.zeros_like(A)
    # Gradient that reaches the state after a block from the steps behind it.
    carried = grad_state
    for index in reversed(range(len(boundaries))):
        block = slice(index * _BLOCK_STEPS, (index + 1) * _BLOCK_STEPS)
        decay, inputs = _block_terms(u[block], delta[block], A, B[block])
        states = _block_states(decay, inputs, boundaries[index])

        grad_C[block] = (grad_y[block, :, None] @ states).squeeze(2)
        grad_states = grad_y[block, ..., None] * C[block, :, None]
        grad_states[-1] += carried
        for step in reversed(range(decay.shape[0] - 1)):
            grad_states[step].addcmul_(decay[step + 1], grad_states[step + 1])
        carried = decay[0] * grad_states[0]

        grad_B[block] = ((delta[block] * u[block])[:, :, None] @ grad_states).squeeze(2)
        grad_input = (grad_states @ B[block, ..., None]).squeeze(-1)  # of delta * u
        # Gradient of the exponent delta * A: each step's decay multiplied the state before it.
        grad_exponent = decay.mul_(grad_states)
        grad_exponent[0] *= boundaries[index]
        grad_exponent[1:] *= states[:-1]
        grad_A += (grad_exponent * delta[block, ..., None]).sum((0, 1))
        grad_delta[block] = grad_exponent.mul_(A).sum(-1).addcmul_(grad_input, u[block])
        grad_u[block] = grad_input * delta[block]
    return grad_u, grad_delta, grad_B, grad_C, grad_A


@_scan_backward_op.register_fake
def _(grad_y, grad_state, u, delta, A, B, C, boundaries):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (u, delta, A, B, C))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])


def _scan_backward(ctx, grad_y, grad_state, _):
    return _scan_backward_op(grad_y, grad_state, *ctx.saved_tensors)


_scan_op.register_autograd(_scan_backward, setup_context=_save_for_backward)

__all__ = ["causal_conv1d_reference", "selective_scan_reference"]
