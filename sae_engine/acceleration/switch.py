"""Other libraries' autoencoders on sae_engine's operations, in place: ``accelerate``, ``restore``, ``accelerated``."""
from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from ._base import CannotAccelerate, refuse

__all__ = ["CannotAccelerate", "accelerate", "accelerated", "restore"]

T = TypeVar("T")

# A module of ours is named as the library whose accelerated classes it holds. Each has LIBRARY, CLASSES (theirs ->
# ours; with exact=True: EXACT where it differs) and check(obj), which raises CannotAccelerate.
LIBRARIES = ("sae_lens", "dictionary_learning", "sparsify")
_originals: dict[type, Any] = {}  # class of theirs -> its __init__, None if inherited; while a library is accelerated


def accelerate(obj: T, *, exact: bool = False) -> T:
    """Makes an autoencoder of SAELens, dictionary_learning or sparsify run on sae_engine's operations, in place;
    or has a language model of transformers skip the weights that it multiplies by zeros.

    The object stays what it is: its class becomes a subclass (so ``isinstance`` holds), its parameters stay the same
    ``Parameter`` objects with the same names, dtypes and strides, optimizers and checkpoints go on, hooks fire with the
    tensors that they always got, methods take and return what they did. Gradients are the same sums of fewer terms: no
    (tokens, F) matrix is multiplied in the backward pass. Results agree with the plain object's to rounding; where two
    pre-activations tie, the lower latent wins.

    ===================  ==========================================================================================
    sae_lens             topk, abstopk, jumprelu and standard; batchtopk and matryoshka_batchtopk, which only train
    dictionary_learning  ``AutoEncoderTopK``, ``BatchTopKSAE``, ``MatryoshkaBatchTopKSAE``, ``JumpReluAutoEncoder``
    sparsify             ``SparseCoder`` with ``activation="topk"``
    transformers         causal models whose MLPs make zeros: ReLU, ProSparse, Gemma 3n's top-k. Up to 8 tokens without
                         gradients do not read what zeros multiply; everything else runs as before. ``W_down`` is laid
                         out column by column, in its place. :func:`sae_engine.lm.sparsify` lets rules make more zeros
    ===================  ==========================================================================================

    Args:
        obj: such an object; or such a class, for an argument like ``dict_class``, then an accelerated subclass is
            returned; or the name of a library, then every such object *made after* is accelerated, until
            ``restore(name)`` (:func:`accelerated` does both).
        exact: also correct gradients that the library gets wrong. There is one: sparsify's encoder passes no gradient
            to the pre-activations that AuxK and multi-top-k read, and passes one through entries that its ReLU sets to
            0. By default those stay as they are in sparsify; ``print(obj)`` says which is in force.

    Returns:
        ``obj`` itself (a class for a class).

    Raises:
        CannotAccelerate (a TypeError): says what stands in the way; nothing has been changed.
        ImportError: ``obj`` names a library that is not installed.

    Example:
        >>> from sae_lens import SAE  # doctest: +SKIP
        >>> sae = accelerate(SAE.load_from_disk("path/to/sae"))  # doctest: +SKIP
    """
    if isinstance(obj, str):
        _accelerate_library(obj, exact)
        return obj
    if isinstance(obj, type):
        return _class_for(obj, exact)  # type: ignore[return-value]
    if _is_language_model(obj):
        from ..lm import switching

        if exact:
            raise ValueError("exact=True corrects gradients of autoencoders; a language model has none to correct")
        return switching.accelerate(obj)
    plain = _plain_class(type(obj))
    peer = _peer_of(plain)
    if peer is None:
        raise refuse(obj, _why_unknown(obj))
    peer.check(obj, plain)
    obj.__class__ = _class_for(plain, exact)  # type: ignore[assignment]
    return obj


def restore(obj: T) -> T:
    """Undoes :func:`accelerate` wholly: the object's own class again, or a library's objects made plain again.

    Objects that were made while a library was accelerated stay accelerated until they are restored themselves.
    Returns ``obj``; one that is not accelerated is returned as it is.

    Raises:
        TypeError: ``obj`` is nothing that :func:`accelerate` takes.
        ImportError: it names a library that is not installed.

    Example:
        >>> sae = restore(accelerate(sae))  # doctest: +SKIP
    """
    if isinstance(obj, str):
        for cls in _library(obj).CLASSES:
            if cls in _originals:
                original = _originals.pop(cls)
                if original is None:
                    del cls.__init__
                else:
                    cls.__init__ = original
        return obj
    if isinstance(obj, type):
        return _plain_class(obj)  # type: ignore[return-value]
    if _is_language_model(obj):
        from ..lm import switching

        return switching.restore(obj)
    plain = _plain_class(type(obj))
    if _peer_of(plain) is None:
        raise TypeError(f"obj must be an autoencoder that accelerate() takes, or a library's name, got {type(obj)}")
    obj.__class__ = plain  # type: ignore[assignment]
    return obj


@contextmanager
def accelerated(*libraries: str, exact: bool = False) -> Iterator[None]:
    """``with se.accelerated():`` every object that the libraries make inside is accelerated, and stays so.

    Without names: those of the libraries that are installed. See :func:`accelerate`.

    Raises:
        ImportError: a library that is named is not installed.

    Example:
        >>> with accelerated("dictionary_learning"):  # doctest: +SKIP
        ...     trainer = TopKTrainer(steps=1000, activation_dim=768, dict_size=16384, k=32, layer=8, lm_name="gpt2")
    """
    names = libraries or tuple(name for name in LIBRARIES if importlib.util.find_spec(name) is not None)
    if not names:
        raise ImportError(f"none of {', '.join(LIBRARIES)} is installed: there is nothing to accelerate")
    begun = []
    try:
        for name in names:
            if not any(cls in _originals for cls in _library(name).CLASSES):  # what was on before stays on after
                begun.append(name)
            _accelerate_library(name, exact)
        yield
    finally:
        for name in begun:
            restore(name)


def _library(name: str) -> Any:
    if name not in LIBRARIES:
        raise ValueError(f"obj must name one of {', '.join(LIBRARIES)}, got {name!r}")
    return importlib.import_module(f".{name}", __package__)


def _is_language_model(obj: Any) -> bool:
    """Whether it is a model of transformers, or a LanguageModel around one; neither is imported to find out."""
    names = {(base.__module__.partition(".")[0], base.__name__) for base in type(obj).__mro__}
    return bool(names & {("transformers", "PreTrainedModel"), (__name__.partition(".")[0], "LanguageModel")})


def _peer_of(plain: type) -> Any:
    """Our module for a class of theirs; None where it is none that we know."""
    name = plain.__module__.partition(".")[0]
    if name not in LIBRARIES:
        return None
    peer = _library(name)
    return peer if plain in peer.CLASSES else None


def _plain_class(cls: type) -> type:
    return cls.__dict__.get("_plain", cls)


def _class_for(cls: type, exact: bool) -> type:
    plain = _plain_class(cls)
    peer = _peer_of(plain)
    if peer is None:
        raise CannotAccelerate(f"{cls.__module__}.{cls.__qualname__} cannot be accelerated: {_why_unknown(cls)}")
    return peer.EXACT.get(plain, peer.CLASSES[plain]) if exact else peer.CLASSES[plain]


def _why_unknown(obj: Any) -> str:
    cls = obj if isinstance(obj, type) else type(obj)
    for base in cls.__mro__[1:]:
        if _peer_of(_plain_class(base)) is not None:
            return f"it is a subclass of {base.__name__}, whose own methods would be lost; accelerate a {base.__name__}"
    if isinstance(getattr(obj, "module", None), nn.Module):
        return "it wraps an autoencoder: accelerate the one inside, its .module"
    if isinstance(getattr(obj, "_orig_mod", None), nn.Module):
        return "it is compiled: accelerate the module first, then compile it"
    if cls.__module__.partition(".")[0] in LIBRARIES:
        return "sae_engine has no operations for this class"
    return f"it is none of the autoencoders of {', '.join(LIBRARIES)}"


def _accelerate_library(name: str, exact: bool) -> None:
    """Wraps each class's ``__init__``: an object of exactly that class is accelerated once it is whole."""
    for cls in _library(name).CLASSES:
        restore_to = _originals.setdefault(cls, cls.__dict__.get("__init__"))
        cls.__init__ = _accelerating(cls, restore_to, exact)


def _accelerating(cls: Any, original: Any, exact: bool) -> Any:
    @functools.wraps(original or super(cls, cls).__init__)
    def __init__(self, *args, **kwargs) -> None:
        (original or super(cls, cls).__init__)(self, *args, **kwargs)
        if type(self) is cls:
            try:
                accelerate(self, exact=exact)
            except CannotAccelerate as reason:  # its maker asked for the object, not for speed
                warnings.warn(f"left as it is: {reason}", stacklevel=2)

    return __init__
