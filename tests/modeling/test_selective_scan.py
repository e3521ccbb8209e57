"""Every body of the scan and of the convolution: against equations written step by step, and against the reference."""

import functools
import inspect
import itertools
import os
import threading
import time
import types

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from panfoma_hf.modeling import reference_kernels, selective_scan
from panfoma_hf.modeling.selective_scan import (
    ScanInputs,
    bidirectional_scan_fn,
    causal_conv1d_fn,
    selective_scan_fn,
    use_scan_backend,
)
from tests.conftest import run_python


CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def device_of(body: str) -> torch.device:
    """Triton's kernels run on a CPU in its interpreter (see conftest.py)."""
    return torch.device("cuda" if CUDA and body in ("triton", "mamba_ssm") else "cpu")


def bodies(*names, slow=()):
    """Parameters for bodies; those that cannot run here are skipped, those that take long left to `make test-all`."""
    marks = {"mamba_ssm": needs_cuda, **dict.fromkeys(slow, pytest.mark.slow)}
    return pytest.mark.parametrize("body", [pytest.param(name, marks=marks.get(name, ()), id=name) for name in names])


@pytest.fixture(autouse=True)
def _installed(request):
    body = request.node.callspec.params.get("body") if hasattr(request.node, "callspec") else None
    if body in ("triton", "mamba_ssm"):
        pytest.importorskip(body)


# -- inputs --------------------------------------------------------------------------------------------------------

OPTIONS = {
    "everything": {"D", "z", "delta_bias", "delta_softplus"},
    "nothing": set(),
    "skip": {"D"},
    "gate": {"z"},
    "bias": {"delta_bias"},
    "bias_and_softplus": {"delta_bias", "delta_softplus"},
    "softplus": {"delta_softplus"},
}


def scan_inputs(seq, *, batch=3, channels=3, states=4, dtype=torch.float64, options="everything"):
    """Random inputs, with gradients; and the keyword ``delta_softplus``."""
    chosen = OPTIONS[options]
    softplus = "delta_softplus" in chosen
    inputs = {
        "u": torch.randn(batch, channels, seq),
        # Step sizes are positive: without softplus, given so.
        "delta": torch.randn(batch, channels, seq) * 0.5 if softplus else torch.rand(batch, channels, seq),
        "A": -torch.rand(channels, states) * 3 - 0.1,
        "B": torch.randn(batch, states, seq),
        "C": torch.randn(batch, states, seq),
        "D": torch.randn(channels),
        "z": torch.randn(batch, channels, seq),
        "delta_bias": torch.randn(channels).abs() * 0.1,
    }
    optional = {"D", "z", "delta_bias"} - chosen
    tensors = {name: t.to(dtype).requires_grad_() for name, t in inputs.items() if name not in optional}
    return tensors, {"delta_softplus": softplus}


def conv_inputs(seq, *, batch=3, channels=3, width=4, dtype=torch.float64, bias=True):
    inputs = {"x": torch.randn(batch, channels, seq), "weight": torch.randn(channels, width)}
    if bias:
        inputs["bias"] = torch.randn(channels)
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def copies(inputs: dict[str, torch.Tensor], **to) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(**to).requires_grad_() for name, tensor in inputs.items()}


def ragged_lengths(seq: int, batch: int = 3) -> torch.Tensor:
    """A whole cell, an empty one, and one in between."""
    return torch.tensor([seq, 0, seq * 2 // 3])[:batch]


def outputs_and_gradients(function, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a function returns, and gradients of a fixed random sum of it, by name; on the CPU in float64."""
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    loss = sum(
        (output.double() * weight.to(output.device)).sum() for output, weight in zip(outputs, weights, strict=True)
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"output {index}": output for index, output in enumerate(outputs)}
    named |= {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {name: tensor.detach().double().cpu() for name, tensor in named.items()}


# Largest error, as a share of the largest value: rounding of what is returned, and in float32 of long sums.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.shape == expected[name].shape, name
        scale = max(expected[name].abs().max().item(), 1.0) if tensor.numel() else 1.0
        torch.testing.assert_close(
            tensor,
            expected[name],
            rtol=0,
            atol=TOLERANCES[dtype] * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# -- the reference against the recurrence ----------------------------------------------------------------------------


def step_by_step(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, lengths=None, reverse=False):
    """The recurrence, one cell, one channel and one step at a time."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    batch, channels, seq = u.shape
    outputs, last = [], []
    for cell, channel in itertools.product(range(batch), range(channels)):
        state = torch.zeros(A.shape[1], dtype=u.dtype)
        length = seq if lengths is None else int(lengths[cell])
        row = [torch.zeros((), dtype=u.dtype)] * seq
        for t in reversed(range(length)) if reverse else range(length):
            step, value = delta[cell, channel, t], u[cell, channel, t]
            state = torch.exp(step * A[channel]) * state + step * B[cell, :, t] * value
            output = (C[cell, :, t] * state).sum()
            if D is not None:
                output = output + D[channel] * value
            if z is not None:
                output = output * F.silu(z[cell, channel, t])
            row[t] = output
        outputs.append(torch.stack(row))
        last.append(state)
    return torch.stack(outputs).view(batch, channels, seq), torch.stack(last).view(batch, channels, -1)


@pytest.fixture(params=[1, 10, 10_000], ids=["blocks_of_1", "blocks_of_10", "one_block"])
def block_steps(request, monkeypatch):
    monkeypatch.setattr(reference_kernels, "_BLOCK_STEPS", request.param)


@pytest.fixture(params=[1, 2, 5], ids=["one_cell_a_tile", "a_short_last_tile", "one_tile"])
def tile_cells(request, block_steps, monkeypatch):
    elements = request.param * 3 * 4 * reference_kernels._BLOCK_STEPS
    monkeypatch.setattr(reference_kernels, "_BLOCK_ELEMENTS", {"cpu": elements})


@pytest.mark.parametrize("options", ["everything", "nothing"])
@pytest.mark.parametrize("seq", [1, 7, 31])
@pytest.mark.usefixtures("tile_cells")
def test_the_reference_is_the_recurrence(seq, options):
    inputs, options = scan_inputs(seq, options=options)
    got = outputs_and_gradients(lambda **inputs: selective_scan_fn(**inputs, **options, return_last_state=True), inputs)
    expected = outputs_and_gradients(lambda **inputs: step_by_step(**inputs, **options), inputs)
    assert_near(got, expected, torch.float64)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_turns_each_cell_round_at_its_own_end(reverse, ragged, options):
    inputs, keywords = scan_inputs(13, options=options)
    keywords |= {"reverse": reverse, "lengths": ragged_lengths(13) if ragged else None}
    got = outputs_and_gradients(
        lambda **inputs: selective_scan_fn(**inputs, **keywords, return_last_state=True), inputs
    )
    expected = outputs_and_gradients(lambda **inputs: step_by_step(**inputs, **keywords), inputs)
    assert_near(got, expected, torch.float64)


def conv_step_by_step(x, weight, bias=None, activation=None, lengths=None, reverse=False):
    outputs = torch.zeros_like(x)
    for cell in range(len(x)):
        length = x.shape[2] if lengths is None else int(lengths[cell])
        steps = x[cell, :, :length].flip(-1) if reverse else x[cell, :, :length]
        rows = []
        for t in range(length):
            value = torch.zeros(x.shape[1], dtype=x.dtype) if bias is None else bias
            for back in range(min(weight.shape[1], t + 1)):
                value = value + weight[:, -1 - back] * steps[:, t - back]
            rows.append(F.silu(value) if activation == "silu" else value)
        if rows:
            result = torch.stack(rows, dim=-1)
            outputs = outputs.index_put(
                (torch.tensor(cell),), F.pad(result.flip(-1) if reverse else result, (0, x.shape[2] - length))
            )
    return outputs


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize(("bias", "activation", "width"), [(True, "silu", 4), (False, None, 1), (True, None, 3)])
def test_the_reference_convolution_is_the_sum_of_the_last_steps(reverse, ragged, bias, activation, width):
    inputs = conv_inputs(13, width=width, bias=bias)
    keywords = {"activation": activation, "reverse": reverse, "lengths": ragged_lengths(13) if ragged else None}
    got = outputs_and_gradients(lambda **inputs: causal_conv1d_fn(**inputs, **keywords), inputs)
    expected = outputs_and_gradients(lambda **inputs: conv_step_by_step(**inputs, **keywords), inputs)
    assert_near(got, expected, torch.float64)


# -- every other body against the reference --------------------------------------------------------------------------


def check_scan(body, seq, dtype, options, reverse, ragged, channels=19, states=5, batch=3):
    """Outputs, states and every gradient, against the reference in float64 on the same rounded inputs."""
    inputs, keywords = scan_inputs(seq, batch=batch, channels=channels, states=states, dtype=dtype, options=options)
    keywords |= {"reverse": reverse, "lengths": ragged_lengths(seq, batch) if ragged else None}

    def run(**tensors):
        return selective_scan_fn(**tensors, **keywords, return_last_state=True, backend=body)

    expected = outputs_and_gradients(
        lambda **tensors: selective_scan_fn(**tensors, **keywords, return_last_state=True, backend="reference"),
        copies(inputs, dtype=torch.float64),
    )
    if ragged:
        keywords["lengths"] = keywords["lengths"].to(device_of(body))
    assert_near(outputs_and_gradients(run, copies(inputs, device=device_of(body))), expected, dtype)


directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
raggedness = pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
narrow_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LENGTHS = [1, 7, 129, 130, 151, 769, 3072]


@bodies("reference", "numba")
@pytest.mark.parametrize("seq", LENGTHS)
@directions
@raggedness
@pytest.mark.parametrize("options", OPTIONS)
def test_a_body_is_the_reference_in_float32(body, seq, options, reverse, ragged):
    check_scan(body, seq, torch.float32, options, reverse, ragged)


@bodies("reference", "numba")
@pytest.mark.parametrize("seq", LENGTHS)
@directions
@raggedness
@narrow_dtypes
def test_a_body_keeps_narrow_dtypes_and_scans_in_float32(body, seq, dtype, reverse, ragged):
    check_scan(body, seq, dtype, "everything", reverse, ragged)


# The interpreter takes about 4 ms for each step of a program, so it gets a few of the cases in the quick run.
@bodies("triton")
@directions
@raggedness
@pytest.mark.parametrize(
    ("seq", "options", "dtype"),
    [
        (1, "everything", torch.float32),
        (7, "nothing", torch.float32),
        (7, "bias_and_softplus", torch.float32),
        (7, "gate", torch.float32),
        (35, "everything", torch.float32),  # one past a block of steps, twice
        (33, "everything", torch.bfloat16),
        (33, "skip", torch.float16),
    ],
)
def test_tritons_body_is_the_reference(body, seq, options, dtype, reverse, ragged):
    check_scan(body, seq, dtype, options, reverse, ragged, channels=3)


@bodies("triton")
@pytest.mark.slow
@directions
@pytest.mark.parametrize("seq", LENGTHS[2:])
def test_tritons_body_is_the_reference_on_long_cells(body, seq, reverse):
    check_scan(body, seq, torch.float32, "everything", reverse, ragged=seq < 769, channels=3, batch=2)


@needs_cuda
@bodies("triton", "mamba_ssm")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_body_is_the_reference_on_a_gpu(body, options, dtype):
    for seq, reverse, ragged in itertools.product(LENGTHS, (False, True), (False, True)):
        check_scan(body, seq, dtype, options, reverse, ragged, channels=130, states=16)


@pytest.mark.parametrize(
    ("body", "channels", "states"),
    [
        ("numba", 16, 16),  # one vector
        ("numba", 144, 16),  # one past a group of channels
        ("numba", 300, 1),
        ("triton", 33, 3),  # one past a program
        ("triton", 65, 16),
    ],
)
def test_any_number_of_channels_and_states_fits(body, channels, states):
    check_scan(body, 9, torch.float32, "everything", True, True, channels=channels, states=states)


def check_conv(body, seq, dtype, reverse, ragged, bias=True, activation="silu", width=4, channels=19):
    inputs = conv_inputs(seq, channels=channels, width=width, dtype=dtype, bias=bias)
    keywords = {"activation": activation, "reverse": reverse, "lengths": ragged_lengths(seq) if ragged else None}
    expected = outputs_and_gradients(
        lambda **tensors: causal_conv1d_fn(**tensors, **keywords, backend="reference"),
        copies(inputs, dtype=torch.float64),
    )
    if ragged:
        keywords["lengths"] = keywords["lengths"].to(device_of(body))
    got = outputs_and_gradients(
        lambda **tensors: causal_conv1d_fn(**tensors, **keywords, backend=body), copies(inputs, device=device_of(body))
    )
    assert_near(got, expected, dtype)


@bodies("numba", "triton")
@directions
@raggedness
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("seq", [1, 2, 7, 130])
def test_a_body_of_the_convolution_is_the_reference(body, seq, dtype, reverse, ragged):
    check_conv(body, seq, dtype, reverse, ragged)


@bodies("numba", "triton", slow=["triton"])
@directions
@pytest.mark.parametrize(("bias", "activation", "width"), [(False, None, 1), (True, None, 3), (False, "silu", 7)])
def test_any_convolution_fits(body, reverse, bias, activation, width):
    check_conv(body, 70, torch.float32, reverse, True, bias, activation, width, channels=150)


@bodies("reference", "numba", "triton", "mamba_ssm")
@raggedness
def test_both_directions_at_once_are_each_by_itself(body, ragged):
    device = device_of(body)
    lengths = ragged_lengths(21).to(device) if ragged else None
    inputs = [copies(scan_inputs(21, dtype=torch.float32)[0], device=device) for _ in range(2)]
    together = bidirectional_scan_fn(
        ScanInputs(**inputs[0]), ScanInputs(**inputs[1]), delta_softplus=True, lengths=lengths, backend=body
    )
    single = tuple(
        selective_scan_fn(**tensors, delta_softplus=True, lengths=lengths, reverse=reverse, backend=body)
        for tensors, reverse in zip(inputs, (False, True), strict=True)
    )
    torch.testing.assert_close(together, single, rtol=0, atol=0)
    tensors = [tensor for given in inputs for tensor in given.values()]
    gradients = [torch.autograd.grad(sum((y * y).sum() for y in ys), tensors) for ys in (together, single)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


# -- what every body promises ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy in Triton's interpreter, of exp(200) in a sigmoid
@bodies("reference", "numba", "triton", "mamba_ssm")
def test_large_and_tiny_steps_do_not_overflow(body):
    inputs, _ = scan_inputs(9, channels=18, dtype=torch.float32)
    sizes = torch.tensor([1e-30, 1e-8, 1e-3, 1.0, 20.0, 89.0, 1e3, 1e4, 1e-20])
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    for delta, softplus in ((sizes, False), (sizes.log() * 3, True), (torch.full((9,), -200.0), True)):
        inputs["delta"] = delta.expand(3, 18, 9).contiguous()
        scan = functools.partial(selective_scan_fn, delta_softplus=softplus)
        got = outputs_and_gradients(functools.partial(scan, backend=body), copies(inputs, device=device_of(body)))
        wide = copies(inputs, dtype=torch.float64)
        expected = outputs_and_gradients(functools.partial(scan, backend="reference"), wide)
        assert all(tensor.isfinite().all() for tensor in got.values())
        assert_near(got, expected, torch.float32)


@bodies("reference", "numba", "triton", "mamba_ssm")
def test_the_same_input_gives_the_same_bits(body):
    inputs, keywords = scan_inputs(40, batch=2, channels=33, dtype=torch.float32)
    inputs = copies(inputs, device=device_of(body))
    runs = [
        outputs_and_gradients(lambda **t: selective_scan_fn(**t, **keywords, backend=body), inputs) for _ in range(2)
    ]
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


@bodies("reference", "numba", "triton", "mamba_ssm")
@directions
def test_a_cell_does_not_see_its_neighbours_or_what_lies_beyond_its_end(body, reverse):
    inputs, keywords = scan_inputs(40, batch=2, channels=3, dtype=torch.float32)
    inputs = copies(inputs, device=device_of(body))
    spoiled = copies(inputs)
    with torch.no_grad():
        for name in ("u", "delta", "B", "C", "z"):
            spoiled[name][1] = torch.nan  # the neighbour
            spoiled[name][0, :, 25:] = torch.nan  # beyond the end
    keywords |= {"lengths": torch.tensor([25, 40], device=device_of(body)), "reverse": reverse, "backend": body}

    def first_cell(**tensors):
        y, state = selective_scan_fn(**tensors, **keywords, return_last_state=True)
        return y[0], state[0]

    clean, spoilt = (outputs_and_gradients(first_cell, tensors) for tensors in (inputs, spoiled))
    assert not clean["output 0"][:, 25:].any()
    for name in ("output 0", "output 1"):
        torch.testing.assert_close(spoilt[name], clean[name], rtol=1e-6, atol=1e-6)
    for name in ("u", "delta", "B", "C", "z"):
        of_cell = (gradients[f"gradient of {name}"][0] for gradients in (spoilt, clean))
        torch.testing.assert_close(*of_cell, rtol=1e-5, atol=1e-5)


@bodies("reference", "numba", "triton", "mamba_ssm")
def test_gradients_of_parameters_do_not_see_what_lies_beyond_an_end(body):
    inputs, keywords = scan_inputs(40, batch=1, channels=3, dtype=torch.float32)
    inputs = copies(inputs, device=device_of(body))
    spoiled = copies(inputs)
    with torch.no_grad():
        for name in ("u", "delta", "B", "C", "z"):
            spoiled[name][0, :, 25:] = torch.nan
    keywords |= {"lengths": torch.tensor([25], device=device_of(body)), "backend": body}
    clean, spoilt = (
        outputs_and_gradients(lambda **t: selective_scan_fn(**t, **keywords, return_last_state=True), tensors)
        for tensors in (inputs, spoiled)
    )
    torch.testing.assert_close(spoilt, clean, rtol=1e-5, atol=1e-5)


@bodies("reference", "numba", "triton", "mamba_ssm")
@pytest.mark.parametrize("name", ["u", "delta", "z", "A", "B", "C", "D", "delta_bias"])
def test_nan_is_not_hidden(body, name):
    inputs, keywords = scan_inputs(9, channels=20, dtype=torch.float32)
    inputs = {key: tensor.detach().to(device_of(body)) for key, tensor in inputs.items()}
    if inputs[name].ndim == 3:
        inputs[name][0, 0, 4] = torch.nan
    else:
        inputs[name][0] = torch.nan
    assert selective_scan_fn(**inputs, **keywords, backend=body)[0, 0, 4].isnan()


@bodies("reference", "numba", "triton")
def test_neither_the_default_dtype_nor_autocast_narrows_the_scan(body):
    inputs, keywords = scan_inputs(20, batch=2, channels=35, dtype=torch.float32)
    conv = conv_inputs(20, batch=2, channels=35, dtype=torch.float32)
    inputs, conv = copies(inputs, device=device_of(body)), copies(conv, device=device_of(body))

    def run():
        scanned = outputs_and_gradients(
            lambda **t: selective_scan_fn(**t, **keywords, return_last_state=True, backend=body), inputs
        )
        convolved = outputs_and_gradients(lambda **t: causal_conv1d_fn(**t, activation="silu", backend=body), conv)
        return [*scanned.values(), *convolved.values()]

    expected = run()
    with torch.autocast(device_of(body).type, dtype=torch.bfloat16):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            torch.testing.assert_close(run(), expected, rtol=0, atol=0)
        finally:
            torch.set_default_dtype(torch.float32)


@bodies("numba", "triton", slow=["triton"])
@directions
def test_tensors_may_lie_anyhow_in_memory(body, reverse):
    """Channels as neighbours (a transpose of (batch, seq, channels)) or apart, parts of wider tensors, expansions."""
    inputs, keywords = scan_inputs(20, batch=2, channels=32, dtype=torch.float32)
    inputs = copies(inputs, device=device_of(body))
    keywords |= {"reverse": reverse, "backend": body}
    expected = outputs_and_gradients(lambda **t: selective_scan_fn(**t, **keywords), inputs)
    for name in ("u", "delta", "z", "B", "C"):
        tensor = inputs[name].detach()
        wide = torch.cat([tensor, tensor], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
        for view in (tensor.transpose(1, 2).contiguous().transpose(1, 2), wide[:, : tensor.shape[1]]):
            assert view.stride(1) == 1
            got = outputs_and_gradients(
                lambda **t: selective_scan_fn(**t, **keywords), {**inputs, name: view.requires_grad_()}
            )
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    expanded = {**inputs, "u": inputs["u"].detach()[:1, :1, :1].expand(2, 32, 20).requires_grad_()}
    packed = {**expanded, "u": expanded["u"].detach().clone().requires_grad_()}
    sums = [
        torch.autograd.grad(selective_scan_fn(**tensors, **keywords).sum(), list(tensors.values()))
        for tensors in (expanded, packed)
    ]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-6)


@bodies("reference", "numba", "triton")
def test_an_empty_sequence_gives_an_empty_output_and_a_zero_state(body):
    inputs, keywords = scan_inputs(0, dtype=torch.float32)
    inputs = copies(inputs, device=device_of(body))
    y, state = selective_scan_fn(**inputs, **keywords, return_last_state=True, backend=body)
    assert y.shape == (3, 3, 0)
    assert not state.any()
    gradients = torch.autograd.grad(y.sum() + state.sum(), list(inputs.values()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert causal_conv1d_fn(y, inputs["A"], backend=body).shape == (3, 3, 0)


@bodies("numba", "triton")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_custom_operators_keep_their_contracts(body):
    """Real and fake kernels agree in shapes, dtypes and strides, and nothing given is changed."""
    inputs, _ = scan_inputs(9, batch=2, channels=20, dtype=torch.float32)
    inputs = {name: tensor.detach().to(device_of(body)) for name, tensor in inputs.items()}
    lists = [[inputs[name]] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    for index in (0, 1, 3, 4, 6):
        lists[index] = [lists[index][0].transpose(1, 2)]
    lengths = torch.tensor([9, 4], device=device_of(body))
    tests = ("test_schema", "test_faketensor")
    options = (lengths, [True], True, True, body)
    torch.library.opcheck(selective_scan._scan_op, (*lists, *options), test_utils=tests)
    y, state, boundaries = selective_scan._scan_op(*lists, *options)
    backward = (torch.randn_like(y), torch.randn_like(state), *lists, lengths, [True], True, boundaries, body)
    torch.library.opcheck(selective_scan._scan_backward_op, backward, test_utils=tests)
    conv = (lists[0], [torch.randn(20, 4, device=device_of(body))], [], lengths, [True], True, body)
    torch.library.opcheck(selective_scan._conv_op, conv, test_utils=tests)
    y = selective_scan._conv_op(*conv)
    torch.library.opcheck(selective_scan._conv_backward_op, (torch.randn_like(y), *conv), test_utils=tests)


def test_the_references_operators_keep_their_contracts():
    inputs, _ = scan_inputs(9, options="nothing", dtype=torch.float32)
    arguments = tuple(inputs.values())
    torch.library.opcheck(reference_kernels._scan_op, arguments, test_utils=("test_schema", "test_faketensor"))
    _, state, boundaries = reference_kernels._scan_op(*arguments)
    detached = tuple(tensor.detach() for tensor in (torch.randn(3, 3, 9), state, *arguments, boundaries))
    torch.library.opcheck(reference_kernels._scan_backward_op, detached, test_utils=("test_schema", "test_faketensor"))


# -- Numba on threads ------------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_no_bit():
    inputs, keywords = scan_inputs(200, batch=5, channels=300, states=16, dtype=torch.float32)

    def run():
        return outputs_and_gradients(lambda **t: selective_scan_fn(**t, **keywords, backend="numba"), inputs)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(7)
        seven = run()
    finally:
        torch.set_num_threads(threads)
    for name, tensor in one.items():
        assert torch.equal(tensor, seven[name]), name


def test_several_threads_may_scan_at_once():
    inputs, keywords = scan_inputs(150, batch=4, channels=300, states=16, dtype=torch.float32)
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    expected = selective_scan_fn(**inputs, **keywords, backend="numba")
    results = []
    workers = [
        threading.Thread(target=lambda: results.append(selective_scan_fn(**inputs, **keywords, backend="numba")))
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


SCAN_IN_PROCESS = """
import os, sys, warnings
import torch
from panfoma_hf.modeling.selective_scan import selective_scan_fn
torch.set_num_threads(2)
def scan(**options):
    torch.manual_seed(0)
    shape = 4, 300, 150
    u, delta, z = (torch.randn(shape) for _ in range(3))
    A, B, C = -torch.rand(300, 16), torch.randn(4, 16, 150), torch.randn(4, 16, 150)
    return selective_scan_fn(u, delta, A, B, C, z=z, delta_softplus=True, **options)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_scans_after_its_parent_did():
    code = (
        SCAN_IN_PROCESS
        + """
expected = scan()
warnings.simplefilter("ignore")  # of Python 3.12, about forks of processes with threads
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(scan(), expected) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert run_python(code).strip() == "0"


def test_kernels_compile_where_no_cache_can_be_written():
    code = (
        """
from numba.core import caching
caching.FunctionCache._impl_class._locator_classes = []
"""
        + SCAN_IN_PROCESS
        + "print((scan() - scan(backend='reference')).abs().max().item() < 1e-3)"
    )
    assert run_python(code).strip() == "True"


def test_one_warning_and_the_same_numbers_where_numba_is_missing():
    code = SCAN_IN_PROCESS + "print(scan().sum().item()); scan()\n"
    code = "import logging; logging.basicConfig(stream=__import__('sys').stdout)\n" + code
    with_numba = float(run_python(code).strip())
    warning, without = run_python(code + "print('done')", without=("numba",)).strip().splitlines()[-3:-1]
    assert "`pip install numba`" in warning
    assert float(without) == pytest.approx(with_numba, abs=1e-2)


# -- choice of a body ------------------------------------------------------------------------------------------------


def plain_inputs(**overrides):
    inputs, _ = scan_inputs(9, **overrides)
    return {name: tensor.detach() for name, tensor in inputs.items()}


def test_float64_takes_the_reference_and_float32_on_a_cpu_numba(monkeypatch):
    taken = []
    kernels = selective_scan._kernels
    monkeypatch.setattr(selective_scan, "_kernels", lambda name: taken.append(name) or kernels(name))
    selective_scan_fn(**plain_inputs(dtype=torch.float64))
    assert not taken
    selective_scan_fn(**plain_inputs(dtype=torch.float32))
    assert set(taken) == {"numba"}
    taken.clear()
    with use_scan_backend("reference"):
        selective_scan_fn(**plain_inputs(dtype=torch.float32))
    assert not taken


def test_the_kernel_of_the_hub_is_taken_once_it_is_there(monkeypatch):
    """`use_kernels=True` replaces the forward of what the package kernels made of the function."""

    class Function:
        def forward(self, *args):
            raise RuntimeError

        def __call__(self, *args, **kwargs):
            return self.forward(*args, **kwargs)

    function = Function()
    monkeypatch.setattr(selective_scan, "hub_selective_scan", function)
    monkeypatch.setattr(selective_scan, "_import_problem", lambda backend: "it is not installed")
    assert selective_scan._fastest_backend("cuda", False, scan=True) == "reference"
    calls = []

    def kernel(self, *args):
        calls.append(args)
        return reference_kernels.selective_scan_reference(*args)

    function.forward = types.MethodType(kernel, function)
    assert selective_scan._fastest_backend("cuda", False, scan=True) == "mamba_ssm"
    inputs = plain_inputs(dtype=torch.float32)
    y = selective_scan.selective_scan_mamba_ssm(**inputs, delta_softplus=True)
    torch.testing.assert_close(y, selective_scan_fn(**inputs, delta_softplus=True))
    assert len(calls) == 1


def test_the_hubs_kernel_is_checked_against_the_parameters_that_it_has():
    """The package kernels refuses a replacement whose parameters differ; the hub's follows Transformers' Mamba."""
    ours, theirs = (
        list(inspect.signature(function).parameters.values())
        for function in (selective_scan.hub_selective_scan, mamba_selective_scan)
    )
    assert [(p.kind, p.default) for p in ours] == [(p.kind, p.default) for p in theirs]


def test_a_choice_on_cuda_can_be_compiled():
    """Imports that torch.compile cannot follow are made beside it."""

    def choice(x):
        return x + len(selective_scan._fastest_backend("cuda", False, True))

    compiled = torch.compile(choice, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(2)), choice(torch.ones(2)))


def test_a_package_that_cannot_be_imported_is_as_good_as_none(monkeypatch):
    def broken(backend):
        raise ImportError("Numba needs NumPy 2.3 or less")

    monkeypatch.setattr(selective_scan, "_kernels", broken)
    selective_scan._import_problem.cache_clear()
    try:
        inputs = plain_inputs(dtype=torch.float32)
        expected = selective_scan_fn(**inputs, backend="reference")
        torch.testing.assert_close(selective_scan_fn(**inputs), expected, rtol=0, atol=0)
        with pytest.raises(ImportError, match=r"Numba needs NumPy 2\.3 or less.*pip install numba"):
            selective_scan_fn(**inputs, backend="numba")
    finally:
        selective_scan._import_problem.cache_clear()


def test_memory_is_kept_until_every_thread_is_done(monkeypatch):
    """An error in one thread must not free what others still write to."""
    numba_kernels = pytest.importorskip("panfoma_hf.modeling.numba_kernels")
    running, failed = threading.Event(), []

    def kernel(start, stop, scratch):
        if threading.current_thread() is threading.main_thread():
            running.wait(10)
            raise MemoryError
        running.set()
        time.sleep(0.3)
        failed.append("finished")

    with pytest.raises(MemoryError):
        numba_kernels._run(kernel, [()], 100, 10**9, 16, [])
    assert failed == ["finished"]  # waited for, and nothing was started after the error


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("delta", (3, 3, 8)),
        ("A", (2, 4)),
        ("B", (3, 9, 4)),
        ("C", (1, 4, 9)),
        ("D", (4,)),
        ("z", (3, 9, 3)),
        ("lengths", (2,)),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_the_tensor(name, shape):
    with pytest.raises(ValueError, match=f"`{name}` must have shape"):
        selective_scan_fn(**{**plain_inputs(), name: torch.zeros(shape)})


@pytest.mark.parametrize(("name", "shape"), [("weight", (2, 4)), ("bias", (4,)), ("lengths", (1,))])
def test_a_wrong_shape_of_a_convolution_is_an_error_that_names_the_tensor(name, shape):
    inputs = {key: tensor.detach() for key, tensor in conv_inputs(9).items()}
    with pytest.raises(ValueError, match=f"`{name}` must have shape"):
        causal_conv1d_fn(**{**inputs, name: torch.zeros(shape)})


def test_directions_of_different_shapes_are_an_error():
    one, other = (ScanInputs(**plain_inputs(batch=batch)) for batch in (2, 3))
    with pytest.raises(
        ValueError, match="Both directions must have tensors of the same shapes, dtypes and devices, got for `u`"
    ):
        bidirectional_scan_fn(one, other)


def test_an_unknown_backend_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="reference, numba, triton, mamba_ssm"):
        selective_scan_fn(**plain_inputs(), backend="warp")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_lengths_that_are_no_whole_numbers_are_an_error(dtype):
    with pytest.raises(ValueError, match=r"`lengths` must be whole numbers.*mask\.sum"):
        selective_scan_fn(**plain_inputs(), lengths=torch.ones(3, dtype=dtype))


@bodies("reference", "numba", "triton")
def test_lengths_beyond_the_sequence_are_the_sequence(body):
    inputs = {name: tensor.to(device_of(body)) for name, tensor in plain_inputs(dtype=torch.float32).items()}
    lengths = torch.tensor([12, 9, -1], dtype=torch.int32)
    ys = [
        selective_scan_fn(**inputs, lengths=given, reverse=True, backend=body)
        for given in (lengths, lengths.clamp(0, 9))
    ]
    torch.testing.assert_close(*ys, rtol=0, atol=0)
    assert not ys[0][2].any()


def test_an_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match="None or 'silu'"):
        causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4), activation="relu")


def test_tensors_on_two_devices_are_an_error():
    """The kernels read memory by address: a tensor that is elsewhere must be noticed before."""
    inputs = plain_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="All tensors must be on one device"):
        selective_scan_fn(**{**inputs, "B": inputs["B"].to("meta")})
    elsewhere = {name: tensor.to("meta") for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match="dtypes and devices"):
        bidirectional_scan_fn(ScanInputs(**inputs), ScanInputs(**elsewhere))
    with pytest.raises(ValueError, match="All tensors must be on one device"):
        causal_conv1d_fn(inputs["u"], torch.zeros(3, 4, device="meta"))


def test_numba_refuses_float64_with_the_remedy():
    with pytest.raises(ValueError, match="computes in float32, got float64"):
        selective_scan_fn(**plain_inputs(dtype=torch.float64), backend="numba")


def test_mamba_ssm_is_refused_with_the_remedy_where_it_cannot_run():
    with pytest.raises((ImportError, ValueError), match=r"panfoma-hf\[cuda\]|CUDA tensors"):
        selective_scan_fn(**plain_inputs(), backend="mamba_ssm")
