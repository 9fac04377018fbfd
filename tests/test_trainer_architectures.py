"""Every architecture trained by a run: its loss falls, and what is saved keeps the codes of what was trained."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from short_runs import settings

from sae_engine.training.architectures import ARCHITECTURES
from sae_engine.training.trainer import Trainer

THRESHOLDS = {"jumprelu_init_threshold": 0.05, "jumprelu_bandwidth": 0.1}


def rows(width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 20 * (torch.randn(1024, 8, generator=generator) @ torch.randn(8, width, generator=generator) + 3)


@pytest.mark.parametrize(("tag", "is_transcoder"), [
    (tag, is_transcoder) for tag in ARCHITECTURES for is_transcoder in (False, True)
    if not (tag == "top_afa" and is_transcoder)  # which is refused
])  # fmt: skip
def test_what_is_saved_is_what_was_trained(tag, is_transcoder, tmp_path):
    """On rows far from unit length: scale of input and of target are in the weights, and each rule keeps the same."""
    fields = ARCHITECTURES[tag].__dataclass_fields__
    sae: dict[str, Any] = {"name": "a", "hook_name": "model.a", "architecture": tag, "d_sae": 64, "lr": 0.003}
    sae |= {"k": 8} if "k" in fields else {}
    sae |= THRESHOLDS if "jumprelu_bandwidth" in fields else {}
    sae |= {"hook_name_out": "model.b"} if is_transcoder else {}
    inputs, outputs = rows(16, 0), 3 * rows(12, 1)
    config = settings(tmp_path / "run", saes=[sae], data__training_tokens=64 * 16, output__save_steps=16)
    trainer = Trainer(config, dataset=[inputs, outputs] if is_transcoder else inputs)
    run = trainer.train()
    losses = [line["losses/mse_loss"] for line in run.metrics() if "losses/mse_loss" in line]
    assert losses[-1] < losses[0]
    (saved,), trained = run.saes().values(), trainer.trainees["a"]
    (reads,), (writes,) = trained.scales
    assert reads < 0.1 and (writes < reads / 2) == is_transcoder
    form, x = trained.sae.eval(), inputs[:256]
    with torch.no_grad():
        assert torch.equal(form.encode(x * reads).to_dense() != 0, saved.encode(x).to_dense() != 0)
        torch.testing.assert_close(form(x * reads) / writes, saved(x), rtol=1e-4, atol=1e-3)
