"""sparsify trains a sparse coder on a language model's hidden states, as it is and with two lines more.

    python examples/sparsify_training.py [steps]

Needs eai-sparsify. The model is the small one that sae_engine carries, so nothing is downloaded. On a CPU sparsify
itself needs SPARSIFY_DISABLE_TRITON=1, which this script sets.
"""

import os
import sys
import tempfile
import time

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from datasets import Dataset
from sparsify import SparseCoderConfig, TrainConfig, Trainer

from sae_engine.data import evaluation_text, load_language_model

SEQUENCES, LENGTH = 8, 128  # of a step


def train(lm, dataset):
    """Nothing in here knows of sae_engine."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=8192, k=32), batch_size=SEQUENCES, layers=[2], log_to_wandb=False,
            save_dir=folder,
        )  # fmt: skip
        Trainer(cfg, dataset, lm.model).fit()


def timed(lm, dataset):
    started = time.perf_counter()
    train(lm, dataset)
    seconds = time.perf_counter() - started
    print(f"{len(dataset) // SEQUENCES} steps in {seconds:.1f} s, the language model included")
    return seconds


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    lm = load_language_model()
    ids = [token for text in evaluation_text() for token in lm.tokenizer(text)["input_ids"]]
    ids = [ids[start : start + LENGTH] for start in range(0, steps * SEQUENCES * LENGTH, LENGTH)]
    dataset = Dataset.from_dict({"input_ids": [row for row in ids if len(row) == LENGTH]}).with_format("torch")

    before = timed(lm, dataset)

    import sae_engine as se

    se.accelerate("sparsify")

    after = timed(lm, dataset)
    print(f"{before / after:.1f}× as fast")


if __name__ == "__main__":
    main()
