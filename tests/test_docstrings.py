"""Docstrings: every example runs and says what it gives, and everything public has one."""
import doctest
import importlib
import inspect
import pkgutil
from importlib.util import find_spec

import pytest
import torch

import sae_engine as se
from sae_engine.acceleration.switch import LIBRARIES
from sae_engine.training import config
from sae_engine.training.architectures import ARCHITECTURES

MODULES = sorted(
    {m.name for m in pkgutil.walk_packages(se.__path__, "sae_engine.") if ".assets" not in m.name} | {"sae_engine"}
)
PUBLIC = {
    "sae_engine": se.__all__,
    **{f"sae_engine.{part}": importlib.import_module(f"sae_engine.{part}").__all__ for part in (
        "functional", "losses", "metrics", "training", "data", "distributed", "latents", "lm")},
    "sae_engine.training.architectures": [kind.__name__ for kind in ARCHITECTURES.values()],
    "sae_engine.training.auto": ["resolved", "widths_of"],
    "sae_engine.training.config": config.__all__,
    "sae_engine.training.config_files": ["json_schema", "with_settings"],
    "sae_engine.training.presets": ["preset"],
    "sae_engine.training.schedule": ["lr_factor", "warm_up_factor"],
    "sae_engine.checkpoints.convert": ["convert"],
    "sae_engine.checkpoints.formats": ["detect", "load", "save"],
    "sae_engine.checkpoints.card": ["SourceCard"],
    "sae_engine.checkpoints.crosslayer.formats": ["detect", "load", "save"],
    "sae_engine.checkpoints.opened": ["opened"],
}  # fmt: skip
METHODS = (se.SparseCodes, se.SparseAutoencoder)

# Without an example that runs, and why.
EXCEPT = {
    "RowTokens": "four fields, which ActivationStore.row_tokens reads",
    "FeatureTokens": "five fields, which Features.tokens reads",
    "Lens": "four fields, which logit_lens fills",
    "Published": "three fields, which push fills",
    "Estimate": "one field, which estimate fills",
    "MeshEstimate": "nine fields, which estimate fills",
    "LayerReport": "four fields, which report fills",
    "Report": "four fields, which report fills",
    "LatentEntries": "two fields, which Features.by_latent reads",
    "ByLatent": "three fields, shown where SparseCodes.by_latent makes them",
    "SparseCodes.assert_fits": "does nothing that one could see, unless it ends the program",
    "SparseCodes.validate": "does nothing that one could see, but under SAE_CHECK=1",
    **dict.fromkeys(
        [f"SparseCodes.{name}" for name in ("bfloat16", "detach", "double", "float", "half")],
        "one line says what it is, and how it is called",
    ),
    **dict.fromkeys(
        [f"SparseAutoencoder.{name}" for name in ("extra_repr", "forward")],
        "torch calls it; the class has the example",
    ),
}
# With one that is skipped.
SKIPPED = {
    **dict.fromkeys(["CapturedStep", "SparseCodes.cuda"], "needs a GPU"),
    **dict.fromkeys(["aligned", "load_state", "save_state"], "needs several processes; test_distributed_* start them"),
    **dict.fromkeys(["accelerate", "accelerated", "restore"], "needs another library; make test-interop runs them"),
    "from_env": "needs processes that torchrun has started; tests/test_mesh.py has them",
    "SparseAutoencoder.from_pretrained": "asks the hub; save_pretrained reads what it wrote",
}  # fmt: skip
# Without a word on errors: they hold what they are given, or have none to raise.
CANNOT_FAIL = {"ByLatent", "Context", "EncodeInfo", "Encoded", "Estimate", "FeatureTokens", "Interrupted",
               "LanguageModel", "LatentEntries", "LayerReport", "Lens", "LossInput", "MeshEstimate", "Published",
               "Pull", "ReLU", "Report", "RowTokens", "Site", "SourceCard", "SparseCodes",
               "SparseCodes.transposed_for", "loss_recovered"}  # fmt: skip


def public():
    """Names and objects, each once, methods after their class."""
    seen = {}
    for module, names in PUBLIC.items():
        for name in names:
            found = getattr(importlib.import_module(module), name)
            if callable(found):
                seen.setdefault(id(found), (name, found))
    for kind in METHODS:
        for name, method in vars(kind).items():
            if not name.startswith("_") and callable(getattr(kind, name)) and not isinstance(method, property):
                seen[kind, name] = (f"{kind.__name__}.{name}", getattr(kind, name))
    return list(seen.values())


@pytest.mark.no_poison
@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    wanted = next((library for library in LIBRARIES if library in name), None)
    if ".acceleration." in name and wanted and find_spec(wanted) is None:
        pytest.skip(f"needs {wanted}")
    module = importlib.import_module(name)
    given = {"torch": torch, "se": se, "__name__": "__main__"}  # as in a program: rules are a user's
    done = doctest.testmod(module, extraglobs=given, optionflags=doctest.ELLIPSIS)
    assert done.failed == 0


@pytest.mark.parametrize(("name", "found"), [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_everything_public_has_an_example(name, found):
    text = inspect.getdoc(found) or ""
    assert len(text) > 20
    examples = doctest.DocTestParser().get_examples(text)
    assert bool(examples) != (name in EXCEPT), "an example is missing, or an exception is none"
    run = [e for e in examples if not e.options.get(doctest.SKIP)]
    assert name in EXCEPT or bool(run) != (name in SKIPPED), "an example is skipped without a reason"


@pytest.mark.parametrize(("name", "found"), [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_errors_are_told(name, found):
    if isinstance(found, type) and issubclass(found, Exception):
        return
    takes = inspect.signature(found).parameters.keys() - {"self", "cls"}
    assert not takes or ("Raises:" in (inspect.getdoc(found) or "")) != (name in CANNOT_FAIL)


def test_every_exception_exists():
    assert EXCEPT.keys() | SKIPPED.keys() | CANNOT_FAIL <= {name for name, _ in public()}
