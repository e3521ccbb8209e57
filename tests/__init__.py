import os
import shutil


# No test may reach for the network; those of the Hub speak to a server on loopback. huggingface_hub reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU Triton's kernels run in its interpreter; it must know before torch imports it.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
