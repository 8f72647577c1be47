"""``torchrun --nproc_per_node 2 two_processes.py FILE...``: trains each configuration in turn in one group of
processes, so that the imports are paid for once."""

import sys
from pathlib import Path

import torch

from llavolta.train.config import TrainConfig, parse_yaml
from llavolta.train.run import train

for file in sys.argv[1:]:
    train(TrainConfig(**parse_yaml(Path(file).read_text(), file)), progress=False)
torch.distributed.destroy_process_group()
