"""SAELens trains a TopK SAE on a language model's activations, as it is and with two lines more.

    python examples/sae_lens_training.py [steps]

Needs sae-lens. The model is the small one that sae_engine carries, so nothing is downloaded.
"""

import itertools
import sys
import time

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_engine.data import evaluation_text, load_language_model, stream_activations

BATCH = 1024


def train(activations, steps):
    """Nothing in here knows of sae_engine."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=activations.shape[1], d_sae=8192, k=32))
    cfg = SAETrainerConfig(
        total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, lr=4e-4, lr_end=4e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    batches = itertools.cycle(activations.split(BATCH))
    return SAETrainer(cfg=cfg, sae=sae, data_provider=batches).fit()


def timed(activations, steps):
    started = time.perf_counter()
    sae = train(activations, steps)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        error = (sae(activations[:BATCH]) - activations[:BATCH]).square().sum(1).mean()
    print(f"{steps} steps in {seconds:.1f} s, squared error {error:.3f}")
    return seconds


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    lm = load_language_model()
    activations = torch.cat(list(stream_activations(lm, evaluation_text(), layer=2, max_tokens=8 * BATCH)))
    activations = (activations - activations.mean(0)) / activations.std()

    before = timed(activations, steps)

    import sae_engine as se

    se.accelerate("sae_lens")

    after = timed(activations, steps)
    print(f"{before / after:.1f}× as fast")


if __name__ == "__main__":
    main()
