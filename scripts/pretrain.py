"""Pretrain on one or many GPUs; the options are those of `panfoma pretrain`.

    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/pretrain.py CORPUS OUT --recipe RECIPE
    accelerate launch --config_file scripts/accelerate/fsdp2.yaml scripts/pretrain.py CORPUS OUT --set max_steps=1000

Ready files: one_gpu, ddp, fsdp2, deepspeed_zero2, and ddp_cpu and fsdp2_cpu to try things out; see docs/pretraining.md.
"""

import sys

from panfoma_cli import app


def main() -> None:
    app(["pretrain", *sys.argv[1:]])


if __name__ == "__main__":
    main()
