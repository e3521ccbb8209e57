"""Triton's kernels compile for GPUs that are not here. What they compute is tested beside the other bodies."""

import pytest

from tests.conftest import run_python


COMPILE = """
import itertools, json, warnings
warnings.simplefilter("ignore")  # Triton announces changes of its defaults
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from panfoma_hf.modeling import triton_kernels as kernels

SIZES = ("cells", "seq", "channels", "states")
OPTIONS = ("HAS_D", "HAS_Z", "HAS_BIAS", "HAS_LENGTHS", "SOFTPLUS", "KEEP", "SILU")

def compile(kernel, sequence, given, ones, settings):
    \"\"\"As a launch would: with what is not given as None, and sizes of 1 as constants.\"\"\"
    settings = {**settings, "STATES": 16, "WIDTH": 4, "REVERSE0": 0, "REVERSE1": 1, **dict.fromkeys(OPTIONS, given)}
    warps = settings.pop("num_warps")
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        if parameter.is_constexpr:
            constants[name] = settings[name]
        elif not given and name in ("D0", "D1", "z0", "z1", "bias0", "bias1", "lengths"):
            constants[name] = None
        elif ones and name in SIZES:
            constants[name] = 1
        elif name in SIZES or name.endswith(("_batch", "_step")):
            signature[name] = "i32"
        elif name == "lengths":
            signature[name] = "*i64"
        else:
            wide = name in ("boundaries", "scratch", "last_state", "grad_last_state") or name[-1] in "ABCD"
            signature[name] = "*fp32" if wide else "*" + sequence
            attributes[(index,)] = [["tt.divisibility", 16]]
        if name in constants:
            signature[name] = "constexpr"
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

spilled = {}
for kernel, settings in (
    (kernels._scan_forward_kernel, {"STEPS": kernels.BLOCK_STEPS, **kernels._FORWARD}),
    (kernels._scan_backward_kernel, {"STEPS": kernels.BLOCK_STEPS, **kernels._BACKWARD}),
    (kernels._conv_forward_kernel, kernels._CONV),
    (kernels._conv_backward_kernel, kernels._CONV),
):
    for sequence, given, ones in (("bf16", True, False), ("fp32", True, False), ("fp16", False, True)):
        compiled = compile(kernel, sequence, given, ones, settings)
        assert compiled.asm["ptx"]
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100():
    """From the source to machine code, without a GPU: what only the interpreter accepts fails here."""
    pytest.importorskip("triton")
    assert run_python(COMPILE, TRITON_INTERPRET="0").strip() == "compiled"
