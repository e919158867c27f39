"""Checkpoints of a training: written whole, with a digest, and checked before anything
is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.files import replacing

State = dict[str, Any]

# of every checkpoint, also those that were written before there was a digest
KEYS = frozenset(
    (
        "model",
        "optimizer",
        "schedule",
        "random",
        "records",
        "seed",
        "epoch",
        "step",
        "position",
        "seconds",
        "sums",
        "diverged",
    )
)
DIGEST = "digest"
# of every checkpoint that has a digest: beside this one, the digest can only have been lost
ASKED = "asked"


def write(path: Path, state: State) -> None:
    """Replace the checkpoint in one go: a kill leaves the old or the new one."""
    whole = {**state, DIGEST: digest(state)}
    with replacing(path) as file:
        try:
            torch.save(whole, file)
        except RuntimeError as error:
            # what torch makes of a write that the system refused
            raise OSError(str(error).splitlines()[0]) from error


def existing(path: Path, resume: bool) -> State | None:
    """The checkpoint that lies in a place, None for none.

    Raises:
        ValueError: for what is no checkpoint of a training: it is not replaced either.
    """
    if not path.exists():
        return None
    if path.is_symlink() and not resume:  # the link is replaced, not what it points to
        return None
    return read(path)


def read(path: Path) -> State:
    """The state of a checkpoint.

    Raises:
        ValueError: for a file that is no checkpoint of a training, or a damaged one.
    """
    cure = "expected a checkpoint that a training wrote; remove it or choose another file"
    try:
        # Whatever a file holds, nothing of it is run. Damaged ones end in errors of many kinds,
        # of the system too: half an archive is one that seeks to a place before its start.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read ({error}), {cure}.") from error
    except Exception as error:
        reason = f"{type(error).__name__}"
        raise ValueError(f"{path} is damaged or foreign ({reason}), {cure}.") from error
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise ValueError(f"{path} is foreign, {cure}.")
    written = state.pop(DIGEST, None)
    lost = written is None and ASKED in state
    if lost or (written is not None and written != digest(state)):
        raise ValueError(f"{path} is damaged: its contents differ from its digest, {cure}.")
    return state


def check_fits(path: Path, model: nn.Module, state: State) -> None:
    """Refuse the checkpoint of another model before a single tensor is copied.

    Raises:
        ValueError: naming the first parameter or buffer that differs.
    """
    saved = state["model"]
    own = model.state_dict()
    for name in (*own, *saved):
        mine = _shape(own.get(name))
        theirs = _shape(saved.get(name))
        if mine != theirs:
            raise ValueError(
                f"{path} is of another model: {name!r} has {theirs} in it, expected {mine}; build "
                "the same model, or choose another file."
            )


def _shape(value: Any) -> str:
    if value is None:
        return "no such tensor"
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return f"type {type(value).__name__}"


def digest(state: Any) -> str:
    """SHA-256 of nested dictionaries, lists, tensors and plain values, in order."""
    found = hashlib.sha256()
    _add(found, state)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    """Let a value join a hash; what comes before its contents tells where it ends."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        about = f"tensor {value.dtype} {tuple(value.shape)};"
        found.update(about.encode())
        contents: Any = flat.view(torch.uint8).numpy()
        found.update(contents)
    elif isinstance(value, Mapping):
        found.update(f"dict {len(value)};".encode())
        for key, entry in value.items():
            _add(found, key)
            _add(found, entry)
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)};".encode())
        for entry in value:
            _add(found, entry)
    else:
        text = repr(value)
        about = f"{type(value).__name__} {len(text)} {text};"
        found.update(about.encode())
