"""Train the embedded model: a small language model of GPT-2's architecture, on the standard library's text.

    python benchmarks/train_embedded_model.py --work DIR --minutes 60              # train, then export
    python benchmarks/train_embedded_model.py --work DIR --minutes 60 --resume     # carry on after a stop
    python benchmarks/train_embedded_model.py --work DIR --export-only             # export the last checkpoint

One CPU thread, one hour. The budget is time, not steps: the learning rate follows the fraction of the
budget that is spent, so it decays fully on any machine. Stop it at will; a checkpoint is written every few
minutes to a temporary name and renamed. ``DIR`` keeps checkpoint, tokenizer, token ids and log; the export
is what ships in ``sae_engine/assets/embedded_model``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae_engine.data.text import END_OF_TEXT, HELD_OUT_MODULES, stdlib_texts

ASSETS = Path(__file__).resolve().parents[1] / "sae_engine" / "assets" / "embedded_model"
CONTEXT = 256
VOCABULARY = 4096
ARCHITECTURE = {
    "vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 256, "n_layer": 4, "n_head": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# The library's own tests are plainer text than the library, so they are read half as often; those of the held-out
# modules quote them and are held out too.
LIBRARY_COPIES = 2
HELD_OUT_TESTS = (
    "test/test_asyncio/test_locks.py", "test/test_contextlib.py", "test/test_contextlib_async.py",
    "test/test_fractions.py", "test/test_graphlib.py", "test/test_heapq.py", "test/test_json/test_decode.py",
    "test/test_shlex.py", "test/test_statistics.py", "test/test_textwrap.py",
)  # fmt: skip
WARMUP = 0.02  # fraction of the budget
FINAL_RATE = 0.02  # fraction of the peak learning rate left at the end


# ---------------------------------------------------------------------------------------------- text


def held_out_documents() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / name).read_text(encoding="utf-8") for name in HELD_OUT_MODULES]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents, each followed by the end-of-text token (id 0)."""
    return np.concatenate([np.array([*e.ids, 0], dtype=np.int16) for e in tokenizer.encode_batch_fast(texts)])


def prepare(work: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray, int]:
    """Tokenizer, training stream, held-out stream, bytes of training text. The tokenizer is made once per folder."""
    work.mkdir(parents=True, exist_ok=True)
    library = list(stdlib_texts())
    known = set(library)
    with_tests = stdlib_texts(exclude=HELD_OUT_MODULES + HELD_OUT_TESTS, include_tests=True)
    texts = library * LIBRARY_COPIES + [text for text in with_tests if text not in known]
    file = work / "tokenizer.json"
    if not file.exists():
        replace_file(file, lambda temporary: train_tokenizer(library).save(str(temporary)))
    tokenizer = Tokenizer.from_file(str(file))
    held_out = token_stream(tokenizer, held_out_documents())
    return tokenizer, token_stream(tokenizer, texts), held_out, sum(len(text.encode()) for text in texts)


def contexts(stream: np.ndarray, starts: np.ndarray) -> Tensor:
    """(n, CONTEXT) int64: the end-of-text token, then CONTEXT - 1 tokens of the stream, as data/ packs them."""
    body = stream[starts[:, None] + np.arange(CONTEXT - 1)].astype(np.int64)
    return torch.from_numpy(np.concatenate([np.zeros((len(starts), 1), np.int64), body], axis=1))


def batches(stream: np.ndarray, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless passes over the stream, cut at another offset and shuffled anew each time."""
    generator = np.random.default_rng(seed)
    step = CONTEXT - 1
    while True:
        starts = np.arange(generator.integers(step), len(stream) - step, step)
        generator.shuffle(starts)
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            yield contexts(stream, starts[first : first + batch_size])


# ------------------------------------------------------------------------------------------ training


def loss_of(model: GPT2LMHeadModel, ids: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


@torch.inference_mode()
def held_out_loss(model: GPT2LMHeadModel, stream: np.ndarray, limit: int | None = None) -> float:
    """Mean nats per token over whole contexts of the stream (the first ``limit`` of them, evenly spread)."""
    model.eval()
    starts = np.arange(0, len(stream) - CONTEXT + 2, CONTEXT - 1)
    if limit is not None and limit < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit).astype(int)]
    total = sum(float(loss_of(model, contexts(stream, part), "sum")) for part in np.array_split(starts, 8) if len(part))
    model.train()
    return total / (len(starts) * (CONTEXT - 1))


def unigram_entropy(stream: np.ndarray) -> float:
    share = np.bincount(stream) / len(stream)
    return float(-sum(p * math.log(p) for p in share if p > 0))


def rate_at(spent: float, peak: float) -> float:
    if spent < WARMUP:
        return peak * spent / WARMUP
    done = min(1.0, (spent - WARMUP) / (1 - WARMUP))
    return peak * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def precision(name: str) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if name == "bfloat16" else nullcontext()


def train(args: argparse.Namespace, stream: np.ndarray, held_out: np.ndarray) -> None:
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(**ARCHITECTURE))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    steps, earlier_seconds = 0, 0.0
    checkpoint = args.work / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        steps, earlier_seconds = state["steps"], state["seconds"]
    step_loss = torch.compile(loss_of) if args.compile else loss_of
    started, saved, ended = time.monotonic(), time.monotonic(), False
    running: list[float] = []
    tokens_per_step = args.batch_size * (CONTEXT - 1)
    with (args.work / "training_log.jsonl").open("a" if args.resume else "w") as log:
        for index, ids in enumerate(batches(stream, args.batch_size, args.seed)):
            if index < steps:  # resumed: the same order of batches, from where it stopped
                continue
            seconds = earlier_seconds + time.monotonic() - started
            spent = seconds / (60 * args.minutes)
            ended = spent >= 1 or steps == args.max_steps
            if ended or steps % args.log_every == 0:
                row = {"step": steps, "tokens": steps * tokens_per_step, "seconds": round(seconds, 1)}
                if running:
                    row["train_loss"] = round(float(np.mean(running)), 4)
                row["held_out_loss"] = round(held_out_loss(model, held_out, None if ended else 32), 4)
                row["learning_rate"] = round(rate_at(spent, args.rate), 8)
                running.clear()
                print(json.dumps(row), file=log, flush=True)
                print(json.dumps(row), flush=True)
            if ended or time.monotonic() - saved > 60 * args.checkpoint_minutes:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": steps}
                state |= {"seconds": seconds, "tokens": steps * tokens_per_step, "minutes": args.minutes}
                state |= {"seed": args.seed, "finished": ended, "command": command_line()}
                replace_file(checkpoint, lambda temporary, state=state: torch.save(state, temporary))
                saved = time.monotonic()
            if ended:
                return
            for group in optimizer.param_groups:
                group["lr"] = rate_at(spent, args.rate)
            with precision(args.precision):
                loss = step_loss(model, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running.append(float(loss.detach()))
            steps += 1


# -------------------------------------------------------------------------------------------- export


def command_line() -> str:
    """The options that made the model, without the folders of the machine it was made on."""
    folders = ("--work", "--export-to")
    kept = [word for before, word in zip(sys.argv, sys.argv[1:], strict=False) if not {before, word} & set(folders)]
    return shlex.join(["python", "benchmarks/train_embedded_model.py", "--work", "DIR", *kept])


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Run ``write(temporary)``, then rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def export(args: argparse.Namespace, tokenizer: Tokenizer, stream: np.ndarray, held_out: np.ndarray, size: int) -> None:
    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    config = GPT2Config(**ARCHITECTURE, dtype="float16", architectures=["GPT2LMHeadModel"])
    model = GPT2LMHeadModel(config)
    model.load_state_dict(state["model"])
    before = held_out_loss(model, held_out)
    # The output head is the embedding matrix (tied): stored once, as transformers does.
    half = {k: v.half().contiguous() for k, v in state["model"].items() if k != "lm_head.weight"}
    model.load_state_dict({**half, "lm_head.weight": half["transformer.wte.weight"]})
    after = held_out_loss(model.float(), held_out)

    folder: Path = args.export_to
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    replace_file(weights, lambda temporary: temporary.write_bytes(save(half, metadata={"format": "pt"})))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_text(folder / "config.json", config.to_json_string())
    replace_file(folder / "tokenizer.json", lambda temporary: tokenizer.save(str(temporary)))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **special}
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    documents = held_out_documents()
    write_text(folder / "evaluation.txt", (END_OF_TEXT + "\n").join(documents))
    write_text(folder / "training_log.jsonl", (args.work / "training_log.jsonl").read_text())
    facts = {
        "sha256": digest, "parameters": sum(p.numel() for p in model.parameters()), "tokens": state["tokens"],
        "passes": state["tokens"] / len(stream), "steps": state["steps"], "minutes": state["seconds"] / 60,
        "stream": len(stream), "bytes": size, "loss": after, "loss_before": before,
        "entropy": unigram_entropy(held_out), "held_out_tokens": len(held_out),
        "bytes_per_token": (sum(len(text.encode()) for text in documents)) / len(held_out),
        "command": state["command"], "seed": state["seed"],
    }  # fmt: skip
    write_text(folder / "README.md", card(facts))
    print(json.dumps(facts, indent=2))


def card(facts: dict) -> str:
    python = platform.python_version()
    modules = ", ".join(f"`{name}`" for name in HELD_OUT_MODULES)
    held_out = textwrap.fill(
        f"`evaluation.txt` ({facts['held_out_tokens']:,} tokens, {facts['bytes_per_token']:.2f} bytes each) is whole "
        f"modules of Python {python}: {modules}. Neither they nor their tests were in the training text. The held-out "
        "loss above is the mean over all of its whole contexts; the log measures it on a fixed sample of 32 of them, "
        "and on all in its last row.",
        width=110, break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return f"""# The embedded model

A small language model of GPT-2's architecture (`GPT2LMHeadModel` in transformers), trained by
`benchmarks/train_embedded_model.py` on the Python standard library. It is here so that a machine without a
network has real activations of a model that has really learned something; it is good for nothing else. It is
not GPT-2, and tables made with it say so and carry its sha256.

| | |
|---|---|
| sha256 of `model.safetensors` | `{facts["sha256"]}` |
| architecture | {ARCHITECTURE["n_layer"]} layers, d_model {ARCHITECTURE["n_embd"]}, {ARCHITECTURE["n_head"]} heads, \
context {CONTEXT}, {VOCABULARY}-token byte-level BPE, tied embeddings |
| parameters | {facts["parameters"]:,}, stored as float16 |
| training text | the standard library of Python {python}: sources, docstrings and pydoc pages \
({LIBRARY_COPIES} copies) and its tests (one); {facts["bytes"] / 1e6:.1f} MB, {facts["stream"]:,} tokens |
| trained on | {facts["tokens"]:,} tokens ({facts["passes"]:.2f} passes over that, {facts["steps"]:,} steps, \
{facts["minutes"]:.0f} minutes) |
| held-out loss | **{facts["loss"]:.3f} nats/token**, {facts["loss"] / facts["bytes_per_token"]:.3f} nats/byte \
(after rounding to float16; {facts["loss_before"]:.3f} nats/token before) |
| unigram entropy of the held-out tokens | {facts["entropy"]:.3f} nats/token |
| seed | {facts["seed"]} |
| command | `{facts["command"]}` |
| machine | CPU only, 1 thread |
| versions | torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__} |

**Contexts.** Documents are joined by `{END_OF_TEXT}` (id 0) and cut into runs of {CONTEXT - 1} tokens; each context
is `{END_OF_TEXT}` followed by one run. `sae_engine.data.stream_activations` packs text the same way.

**Files.** `model.safetensors`, `config.json`, `tokenizer.json` and `tokenizer_config.json` are what
`AutoModelForCausalLM` and `AutoTokenizer` load; `training_log.jsonl` has the losses along the way.

**Held-out text.** {held_out}

**Licence.** The text is the Python standard library, Copyright (c) Python Software Foundation, under the
[PSF License Version 2](https://docs.python.org/3/license.html); `evaluation.txt` reproduces parts of it
unchanged. The weights are offered under the licence of this repository.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, tokenizer and log")
    parser.add_argument("--export-to", type=Path, default=ASSETS)
    parser.add_argument("--minutes", type=float, default=60.0, help="training budget in wall-clock minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="contexts per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    parser.add_argument("--log-every", type=int, default=100, help="steps between rows of the log")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--max-steps", type=int, default=None, help="stop after so many steps (to try things out)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, stream, held_out, size = prepare(args.work)
    if not args.export_only:
        train(args, stream, held_out)
    export(args, tokenizer, stream, held_out, size)


if __name__ == "__main__":
    main()
