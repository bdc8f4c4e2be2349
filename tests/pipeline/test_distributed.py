"""Ranks finding each other."""

from __future__ import annotations

import deepspeed
import pytest
import torch

from data_prep.errors import UserError
from pipeline import distributed
from pipeline.distributed import World


def test_a_taken_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a second training starts on deepspeed's default port."""

    def init(**options: object) -> None:
        raise torch.distributed.DistNetworkError("address already in use\nC++ frames")

    monkeypatch.setattr(deepspeed, "init_distributed", init)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="cannot meet at 127.0.0.1, port 29500 .address already in use.; beside"):
        distributed.start(World(0, 0, 2))
