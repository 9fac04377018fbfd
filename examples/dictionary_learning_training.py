"""dictionary_learning trains TopK dictionaries on a language model's activations, as it is and with two lines more.

    python examples/dictionary_learning_training.py [steps]

Needs dictionary-learning. The model is the small one that sae_engine carries, so nothing is downloaded.
"""

import itertools
import sys
import time

import torch
from dictionary_learning.trainers import TopKTrainer
from dictionary_learning.training import trainSAE

from sae_engine.data import evaluation_text, load_language_model, stream_activations

BATCH = 1024


def train(activations, steps):
    """Nothing in here knows of sae_engine."""
    config = {
        "trainer": TopKTrainer, "activation_dim": activations.shape[1], "dict_size": 8192, "k": 32, "lr": 4e-4,
        "steps": steps, "warmup_steps": 1, "layer": 2, "lm_name": "embedded", "device": "cpu", "seed": 0,
    }  # fmt: skip
    buffer = itertools.cycle(activations.split(BATCH))
    trainSAE(data=buffer, trainer_configs=[config], steps=steps, device="cpu")


def timed(activations, steps):
    started = time.perf_counter()
    train(activations, steps)
    seconds = time.perf_counter() - started
    print(f"{steps} steps in {seconds:.1f} s")
    return seconds


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    lm = load_language_model()
    activations = torch.cat(list(stream_activations(lm, evaluation_text(), layer=2, max_tokens=8 * BATCH)))
    activations = (activations - activations.mean(0)) / activations.std()

    before = timed(activations, steps)

    import sae_engine as se

    se.accelerate("dictionary_learning")

    after = timed(activations, steps)
    print(f"{before / after:.1f}× as fast")


if __name__ == "__main__":
    main()
