"""Put a pretrained model into the package, in half precision: what `panfoma_hf.checkpoint` gives.

python scripts/release_checkpoint.py runs/small/model small
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoTokenizer

import panfoma_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model, as pretraining leaves it")
    parser.add_argument("name", help="name in the package")
    parser.add_argument("--folder", type=Path, default=Path(panfoma_hf.__file__).parent / "shipped")
    arguments = parser.parse_args()

    model = AutoModelForPreTraining.from_pretrained(arguments.model, dtype=torch.float32)
    # What the scan needs in float32 stays so; see `_keep_in_fp32_modules_strict`.
    exact = tuple(model._keep_in_fp32_modules_strict)
    weights = {
        name: tensor if name.endswith(exact) else tensor.to(torch.float16)
        for name, tensor in model.state_dict().items()
    }
    too_large = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if too_large:
        raise SystemExit(f"Weights must fit into half precision, got {', '.join(too_large)} that do not.")

    folder = arguments.folder / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, state_dict=weights)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(scratch)
        # The package's own code loads it; `panfoma export` adds a copy for those who do not have the package.
        for path in Path(scratch).iterdir():
            if path.suffix == ".py":
                continue
            content = path.read_bytes()
            if path.suffix == ".json":
                settings = json.loads(content)
                settings.pop("auto_map", None)
                content = (json.dumps(settings, indent=2) + "\n").encode()
            (folder / path.name).write_bytes(content)
    tensors = load_file(folder / "model.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {sum(tensor.numel() for tensor in tensors.values()):,} weights, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
