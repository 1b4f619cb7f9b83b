"""A process of a run of several, for tests/training/test_distributed.py.

python distributed_run.py OUT OPTIONS [RANK STEP], with options as JSON; "holes" makes pixels missing. The process of
that rank is killed after that step.
"""

import dataclasses
import json
import os
import signal
import sys

import torch

import aevb
from aevb.training import pictures

pictures.draw = lambda *_: {}
digits = aevb.data.load("digits")
# 130 images in batches of 43: of the last, of one image, most processes have none.
digits = dataclasses.replace(digits, train_images=digits.train_images[:130], train_labels=None)
options = json.loads(sys.argv[2])
if options.pop("holes", False):
    generator = torch.Generator().manual_seed(0)
    masks = {
        part: torch.rand(getattr(digits, f"{part}_images").shape, generator=generator) < 0.7
        for part in ("train", "test")
    }
    digits = dataclasses.replace(digits, observed=masks)
config = aevb.TrainConfig(
    out=sys.argv[1],
    resume=True,
    epochs=6,
    batch_size=43,
    hidden_dims=(40,),
    latent_dim=5,
    learning_rate=3e-3,
    threads=1,
    checkpoint_seconds=0.0,
    progress=False,
    **options,
)
trainer = aevb.Trainer(config, dataset=digits)
if len(sys.argv) > 3:
    rank, step = map(int, sys.argv[3:])

    def die(*_):
        if trainer.processes.rank == rank and trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.optimizer.register_step_post_hook(die)
trainer.fit()
