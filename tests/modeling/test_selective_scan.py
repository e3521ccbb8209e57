"""The scan against equations written step by step, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

from panfoma_hf.modeling import reference_kernels as selective_scan
from panfoma_hf.modeling.selective_scan import selective_scan_fn


def step_by_step(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The recurrence, one cell, one channel, one state and one step at a time."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    batch, channels, seq = u.shape
    outputs, last = [], []
    for cell in range(batch):
        for channel in range(channels):
            state = torch.zeros(A.shape[1], dtype=u.dtype)
            for t in range(seq):
                step, value = delta[cell, channel, t], u[cell, channel, t]
                state = torch.exp(step * A[channel]) * state + step * B[cell, :, t] * value
                output = (C[cell, :, t] * state).sum()
                if D is not None:
                    output = output + D[channel] * value
                if z is not None:
                    output = output * F.silu(z[cell, channel, t])
                outputs.append(output)
            last.append(state)
    return torch.stack(outputs).view(batch, channels, seq), torch.stack(last).view(batch, channels, -1)


def scan_inputs(seq, *, batch=3, channels=3, states=4, dtype=torch.float64, full=True):
    inputs = {
        "u": torch.randn(batch, channels, seq),
        "delta": torch.randn(batch, channels, seq) * 0.5,
        "A": -torch.rand(channels, states) * 3 - 0.1,
        "B": torch.randn(batch, states, seq),
        "C": torch.randn(batch, states, seq),
    }
    if full:
        inputs |= {
            "D": torch.randn(channels),
            "z": torch.randn(batch, channels, seq),
            "delta_bias": torch.randn(channels) * 0.1,
        }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


@pytest.fixture(params=[1, 10, 10_000], ids=["blocks_of_1", "blocks_of_10", "one_block"])
def block_steps(request, monkeypatch):
    monkeypatch.setattr(selective_scan, "_BLOCK_STEPS", request.param)


@pytest.fixture(params=[1, 2, 5], ids=["one_cell_a_tile", "a_short_last_tile", "one_tile"])
def tile_cells(request, block_steps, monkeypatch):
    elements = request.param * 3 * 4 * selective_scan._BLOCK_STEPS
    monkeypatch.setattr(selective_scan, "_BLOCK_ELEMENTS", {"cpu": elements})


@pytest.mark.parametrize("full", [True, False], ids=["skip_gate_bias", "bare"])
@pytest.mark.parametrize("seq", [1, 7, 31])
@pytest.mark.usefixtures("tile_cells")
def test_output_state_and_every_gradient_match_the_recurrence(seq, full):
    inputs = scan_inputs(seq, full=full)
    y, state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    expected_y, expected_state = step_by_step(**inputs, delta_softplus=True)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)

    weight_y, weight_state = torch.randn_like(y), torch.randn_like(state)
    loss, expected_loss = (
        (a * weight_y).sum() + (b * weight_state).sum() for a, b in ((y, state), (expected_y, expected_state))
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    expected = torch.autograd.grad(expected_loss, list(inputs.values()))
    for name, gradient, expected_gradient in zip(inputs, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="float32"),
        pytest.param(torch.bfloat16, 2e-2, id="bfloat16"),
        pytest.param(torch.float16, 2e-3, id="float16"),
    ],
)
@pytest.mark.parametrize("seq", [7, 129, 130, 151])
def test_narrow_input_keeps_its_dtype_and_scans_in_float32(seq, dtype, tolerance):
    inputs = {name: tensor.detach().to(dtype) for name, tensor in scan_inputs(seq).items()}
    y, state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    expected_y, expected_state = selective_scan_fn(**wide, delta_softplus=True, return_last_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y.double(), expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5)


def test_custom_operators_keep_their_contracts():
    inputs = {name: tensor.detach().float() for name, tensor in scan_inputs(9, full=False).items()}
    arguments = tuple(tensor.requires_grad_() for tensor in inputs.values())
    torch.library.opcheck(selective_scan._scan_op, arguments, test_utils=("test_schema", "test_faketensor"))
    _, state, boundaries = selective_scan._scan_op(*arguments)
    detached = tuple(tensor.detach() for tensor in (torch.randn(3, 3, 9), state, *arguments, boundaries))
    torch.library.opcheck(selective_scan._scan_backward_op, detached, test_utils=("test_schema", "test_faketensor"))


def test_an_empty_sequence_gives_an_empty_output_and_a_zero_state():
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(0).items()}
    y, state = selective_scan_fn(**inputs, return_last_state=True)
    assert y.shape == (3, 3, 0)
    assert not state.any()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("delta", (3, 3, 8)), ("A", (2, 4)), ("B", (3, 9, 4)), ("C", (1, 4, 9)), ("D", (4,)), ("z", (3, 9, 3))],
)
def test_a_wrong_shape_is_an_error_that_names_the_tensor(name, shape):
    inputs = {key: tensor.detach() for key, tensor in scan_inputs(9).items()}
    with pytest.raises(ValueError, match=f"`{name}` must have shape"):
        selective_scan_fn(**{**inputs, name: torch.zeros(shape)})


def test_an_unknown_backend_is_an_error_that_lists_the_known():
    inputs = {key: tensor.detach() for key, tensor in scan_inputs(9).items()}
    with pytest.raises(ValueError, match="reference, mamba_ssm"):
        selective_scan_fn(**inputs, backend="warp")


def test_mamba_ssm_is_refused_with_the_remedy_where_it_cannot_run():
    inputs = {key: tensor.detach() for key, tensor in scan_inputs(9).items()}
    with pytest.raises((ImportError, ValueError), match=r"panfoma-hf\[cuda\]|CUDA tensors"):
        selective_scan_fn(**inputs, backend="mamba_ssm")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mamba_ssm_matches_the_reference_on_cuda():
    pytest.importorskip("mamba_ssm")
    inputs = {key: tensor.detach().float().cuda() for key, tensor in scan_inputs(151, channels=8, states=16).items()}
    y, state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True, backend="mamba_ssm")
    expected = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True, backend="reference")
    torch.testing.assert_close((y, state), expected, rtol=1e-3, atol=1e-3)
