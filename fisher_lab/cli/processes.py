"""Several processes of one command, as `torchrun -m fisher_lab ...` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch

from fisher_lab._ground.ranks import ALONE, Ranks, is_first, ranks_of


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the group that torchrun has prepared; only its first process prints.

    Without torchrun, or with one process, this does nothing.

    Yields:
        The processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    prepared = "TORCHELASTIC_RUN_ID" in os.environ
    if count == 1 or not prepared or torch.distributed.is_initialized():
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(backend)
    try:
        if is_first():
            yield ranks_of()
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield ranks_of()
    finally:
        torch.distributed.destroy_process_group()
