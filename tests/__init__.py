import os
import shutil


# Without a GPU Triton's kernels run in its interpreter; it must know before torch imports it.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
