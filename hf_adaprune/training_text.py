"""Calibration windows from a Trainer's own data set."""

from __future__ import annotations

from typing import Any

import torch

from .errors import CalibrationError
from .token_blocks import TokenBlocks

__all__ = ["dataset_blocks"]


def dataset_blocks(dataloader: Any, samples: int, length: int, seed: int) -> TokenBlocks:
    """Samples of a data set, as its collator hands them to the model; the loader's own order is not touched.

    Args:
        dataloader (`DataLoader`): of a data set with a length.
        samples (`int`): how many.
        length (`int`): tokens of a window; longer samples are cut off.
        seed (`int`): of the choice.

    Returns:
        [`TokenBlocks`]: windows `[samples, length]` of one domain, `train`.

    Raises:
        CalibrationError: the data set is a stream, or gives no token ids.
    """
    dataset = getattr(dataloader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise CalibrationError(
            "statistics from the training data need a data set with a length, this one is a stream. Give the callback "
            "data='calibration' and name calibration.sources in its config."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[torch.Tensor] = []
    for index in order:
        if len(rows) == samples:
            break
        batch = dataloader.collate_fn([dataset[index]])
        ids = batch.get("input_ids") if hasattr(batch, "get") else None
        if ids is None:
            raise CalibrationError(
                "the training batches hold no `input_ids`. Give the callback data='calibration' and name "
                "calibration.sources in its config."
            )
        ids = torch.as_tensor(ids).reshape(-1)
        mask = batch.get("attention_mask")
        if mask is not None and torch.as_tensor(mask).numel() == ids.numel():
            ids = ids[torch.as_tensor(mask).reshape(-1).bool()]
        if len(ids) > 1:
            rows.append(ids[:length])
    if not rows:
        raise CalibrationError("the training data hold no sample of two tokens or more.")
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = True
    return TokenBlocks(ids, mask, torch.zeros(len(rows), dtype=torch.long), ("train",))
