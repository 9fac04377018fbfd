"""Configurations in files: YAML, checked by pydantic, with every fault said at once under its path.

``import sae_engine`` needs neither: both are imported where a file or a dictionary is read. The fields of an
architecture stand flat in an entry of ``saes``; what pydantic checks is made of the dataclasses, one such flat class
for each architecture, told apart by ``architecture``.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_type_hints

from ..data._require import require
from ._faults import ConfigError, nearest
from .architectures import ARCHITECTURES, Architecture, TopKSAE
from .sae_config import SAEConfig, architecture_in_a_file

Config = TypeVar("Config")
_REFUSING = {"extra": "forbid", "strict": True}
_DEFAULT = TopKSAE.tag


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration of that dataclass. :meth:`TrainConfig.from_dict` calls it."""
    if not isinstance(values, Mapping):
        raise ConfigError([("", f"a configuration must be a mapping of names to values, got {values!r}")])
    try:
        text = json.dumps(_whole_numbers(_with_mesh(_with_architectures(values))))
    except (TypeError, ValueError) as error:
        raise ConfigError([("", f"a configuration holds words, numbers, lists and mappings alone: {error}")]) from None
    faults: list[tuple[str, str]] = []
    checked = _checked_by_pydantic(kind, json.loads(text), faults)
    made = _parts(kind, checked, faults, "")
    try:
        config = kind(**made)
    except ConfigError as error:  # where parts are at fault, only what the whole says of itself can be trusted
        faults += [fault for fault in error.faults if not faults or fault[0] in ("seed", "device")]
    if faults:
        raise ConfigError(faults)
    return config


def from_yaml(kind: type[Config], path: str | PathLike[str]) -> Config:
    """The configuration of a file. :meth:`TrainConfig.from_yaml` calls it."""
    values = read_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    return from_dict(kind, {} if values is None else values)


def with_settings(config: Config, settings: Sequence[str]) -> Config:
    """A configuration with ``path=value`` set in it, each value as YAML has it.

    Raises:
        ConfigError: a setting is none, or leads nowhere; or the values do not make a configuration.

    Example:
        >>> from sae_engine.training.config import SAEConfig, TrainConfig
        >>> config = TrainConfig(saes=[SAEConfig(hook_name="blocks.2.hook_resid_pre")])
        >>> with_settings(config, ["saes.0.k=64", "data.training_tokens=5e6"]).data.training_tokens
        5000000
    """
    values = config.to_dict()  # type: ignore[attr-defined]
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise ConfigError([("--set", f"must be PATH=VALUE, as saes.0.k=64, got {setting!r}")])
        _set(values, path.strip().split("."), read_yaml(text, f"--set {path}"))
    return from_dict(type(config), values)


def json_schema(kind: type) -> dict[str, Any]:
    """What a file may hold, as JSON schema: for an editor that completes and checks it.

    Raises:
        ImportError: pydantic is not installed.

    Example:
        >>> from sae_engine.training.config import TrainConfig
        >>> sorted(json_schema(TrainConfig)["properties"])[:3]
        ['data', 'device', 'eval']
    """
    schema = _adapter(kind).json_schema()
    if "mesh" in schema["properties"]:  # a number is made a mapping of before pydantic sees it
        schema["properties"]["mesh"]["anyOf"].insert(0, {"type": "integer", "minimum": 1})
    return schema


# ------------------------------------------------------------------------------------------------------ YAML


def read_yaml(text: str, source: str) -> Any:
    """What YAML 1.2 says: ``1e-3`` is a number, ``on`` and ``1:30`` are words; a key given twice is a fault."""
    yaml = require("yaml")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError([("", f"{source}: {' '.join(str(error).split())}")]) from None


def to_yaml(values: Mapping[str, Any], notes: Mapping[tuple, str] | None = None) -> str:
    """The text of a file, in the order of the fields, numbers so that they are read back bit for bit.

    ``notes`` become comments behind the values at their paths.
    """
    yaml = require("yaml")
    try:
        text = yaml.dump(_plain_scalars(values), Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=2**20)
    except yaml.representer.RepresenterError as error:
        raise ConfigError([("", f"a configuration holds words, numbers, lists and mappings alone: {error}")]) from None
    if not notes:
        return text
    lines = text.splitlines()
    for path, node in _nodes(yaml.compose(text, Loader=_loader())):
        if path in notes:
            lines[node.end_mark.line] += f"  # {notes[path]}"
    return "\n".join(lines) + "\n"


def differences(before: Any, after: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The paths at which two configurations as dictionaries differ, with what the first has there.

    Example:
        >>> list(differences({"a": {"b": "auto", "c": 1}}, {"a": {"b": 3, "c": 1}}))
        [(('a', 'b'), 'auto')]
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in after.items():
            yield from differences(before.get(name), value, (*path, name))
    elif isinstance(before, list) and isinstance(after, list) and any(isinstance(value, dict) for value in after):
        for number, value in enumerate(after):
            yield from differences(before[number] if number < len(before) else None, value, (*path, number))
    elif before != after:
        yield path, before


def _nodes(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The values of a YAML text, each with its path."""
    yield path, node
    pairs = ((key.value, value) for key, value in node.value) if node.id == "mapping" else (
        enumerate(node.value) if node.id == "sequence" else ())  # fmt: skip
    for name, value in pairs:
        yield from _nodes(value, (*path, name))


@functools.cache
def _loader() -> type:
    yaml = require("yaml")
    base: Any = yaml.SafeLoader

    class Loader(base):
        yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 - as its base class has it

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if (name := getattr(key, "value", None)) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    for tag, pattern, first in _SCALARS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node), 0))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(_number(loader, node)))
    return Loader


def _number(loader: Any, node: Any) -> str:
    text = loader.construct_scalar(node).replace("_", "")
    return text.replace(".", "", 1) if text.lstrip("+-")[:2].lower() in (".i", ".n") else text


# Tag, what is one, and its first characters.
_SCALARS = (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
     r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
)  # fmt: skip


@functools.cache
def _dumper() -> type:
    base: Any = require("yaml").SafeDumper

    class Dumper(base):
        """Short lists of plain values stand in one line; lists are indented; nothing is an alias."""

        yaml_implicit_resolvers = _loader().yaml_implicit_resolvers  # type: ignore[attr-defined]

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
            return super().increase_indent(flow, False)

    def sequence(dumper: Any, values: Sequence) -> Any:
        flow = all(not isinstance(value, Mapping | list) for value in values)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)

    Dumper.add_representer(list, sequence)
    def number(dumper: Any, value: float) -> Any:
        shown = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
        return dumper.represent_scalar("tag:yaml.org,2002:float", shown)

    Dumper.add_representer(float, number)
    return Dumper


def _plain_scalars(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_scalars(inner) for key, inner in value.items()}
    return [_plain_scalars(inner) for inner in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------- what pydantic sees


@functools.cache
def _adapter(kind: type, others: tuple[type[Architecture], ...] = ()) -> Any:
    return require("pydantic").TypeAdapter(_checked(kind, others))


@functools.cache
def _checked(kind: type, others: tuple[type[Architecture], ...]) -> Any:
    """The dataclass as pydantic checks it: no other names, no conversions, entries of ``saes`` flat; ``others`` are
    architectures beside the library's."""
    if kind is SAEConfig:
        pydantic = require("pydantic")
        flat = tuple(map(_flat, (*ARCHITECTURES.values(), *others)))
        return Annotated[Union[flat], pydantic.Field(discriminator="architecture")]  # noqa: UP007 - made here
    return _copied(kind.__name__, [kind], {}, others)


def _flat(kind: type[Architecture]) -> type:
    """An entry of ``saes`` of one architecture."""
    return _copied(f"{kind.__name__}Entry", [SAEConfig, kind],
                   {"architecture": (Literal[kind.tag], dataclasses.field(default=kind.tag))}, ())  # fmt: skip


def _of_users(values: Any) -> tuple[type[Architecture], ...]:
    """The architectures of users that a configuration names and that are there."""
    saes = values.get("saes") if isinstance(values, dict) else None
    tags = [entry.get("architecture") for entry in (saes if isinstance(saes, list) else ()) if isinstance(entry, dict)]
    found = [_known(tag) for tag in dict.fromkeys(tag for tag in tags if isinstance(tag, str) and ":" in tag)]
    return tuple(kind for kind in found if kind is not None)


def _known(tag: Any) -> type[Architecture] | None:
    try:
        return architecture_in_a_file(tag)
    except ConfigError:
        return None


def _copied(name: str, kinds: list[type], instead: dict[str, Any], others: tuple[type[Architecture], ...]) -> type:
    """A dataclass of the fields of others, without what these do when they are made."""
    entries: list[Any] = []
    for kind in kinds:
        hints = get_type_hints(kind)
        for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
            if entry.name in instead:
                entries.append((entry.name, *instead[entry.name]))
                continue
            default = {key: getattr(entry, key) for key in ("default", "default_factory")
                       if getattr(entry, key) is not dataclasses.MISSING}  # fmt: skip
            entries.append((entry.name, _inner(hints[entry.name], others), dataclasses.field(**default)))
    return dataclasses.make_dataclass(name, entries, kw_only=True, namespace={"__pydantic_config__": _REFUSING})


def _inner(hint: Any, others: tuple[type[Architecture], ...]) -> Any:
    """A field's type with our dataclasses in it replaced."""
    if dataclasses.is_dataclass(hint):
        return _checked(hint, others)  # type: ignore[arg-type]
    if (part := _optional(hint)) is not None:
        return Union[_checked(part, others), None]  # noqa: UP007 - made here
    if getattr(hint, "__origin__", None) is tuple and dataclasses.is_dataclass(hint.__args__[0]):
        return tuple[_checked(hint.__args__[0], others), ...]  # type: ignore[misc,arg-type]
    return hint


def _optional(hint: Any) -> Any:
    """The dataclass of a part that may be left out; None where the hint is of anything else."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if type(None) in get_args(hint) and dataclasses.is_dataclass(kinds[0]) else None


# ------------------------------------------------------------------------------------------------------ faults


def _checked_by_pydantic(kind: type, values: Any, faults: list[tuple[str, str]]) -> Any:
    """What pydantic makes of the values. Its faults are noted and what they are about is left at its default, so that
    the ranges of all else are checked too."""
    pydantic = require("pydantic")
    for _ in range(2):
        try:
            return _adapter(kind, _of_users(values)).validate_json(json.dumps(values))
        except pydantic.ValidationError as error:
            found: dict[tuple, list[dict]] = {}
            for entry in error.errors(include_url=False):
                found.setdefault(_path(entry, values), []).append(entry)
            faults += [_fault(kind, path, entries, values) for path, entries in found.items()]
            for path in found:
                _mend(values, path)
    raise ConfigError(faults)


def _path(entry: dict, values: Any) -> tuple:
    """Where a fault lies in the file: without the names of types and architectures that pydantic adds."""
    path: list = []
    for step in entry["loc"]:
        has = step in (values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ())
        if has:
            values = values[step]
        if has or (isinstance(values, dict) and entry["type"] == "missing" and step == entry["loc"][-1]):
            path.append(step)
    return tuple(path)


def _fault(kind: type, path: tuple, entries: list[dict], values: Any) -> tuple[str, str]:
    """The path and what is wrong there, in our words."""
    first, value, where = entries[0], _at(values, path), ".".join(map(str, path))
    if first["type"] == "missing":
        return where, f"must have more entries, got {value!r}" if isinstance(value, list) else "must be given"
    if first["type"] == "unexpected_keyword_argument":
        return where, _unknown(kind, path, values)
    if first["type"] == "union_tag_invalid":
        try:
            architecture_in_a_file(value["architecture"])
        except ConfigError as error:
            return error.below(where).faults[0]
    right = [_EXPECTED.get(entry["type"]) or entry.get("ctx", {}).get("expected") or entry["msg"] for entry in entries]
    return where, f"must be {' or '.join(dict.fromkeys(right))}, got {value!r}"


_EXPECTED = {"int_type": "an int", "int_from_float": "an int", "float_type": "a number", "string_type": "a word",
             "bool_type": "true or false", "tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping",
             "dataclass_type": "a mapping of names to values", "model_attributes_type": "a mapping of names to values",
             "too_long": "a list of fewer"}  # fmt: skip


def _unknown(kind: type, path: tuple, values: Any) -> str:
    """A name that is no field: which one is meant, here or elsewhere."""
    name, here = str(path[-1]), _names(kind, path[:-1], values)
    places = {inner: inner for inner in _fields(kind)} | {inner: f"saes.0.{inner}" for inner in _fields(SAEConfig)}
    for part in ("model", "data", "optim", "eval", "logger", "output", "mesh"):
        places |= {inner: f"{part}.{inner}" for inner in _names(kind, (part,), values)}
    if name in places:
        return f"unknown; did you mean {places[name]}?"
    if like := nearest(name, here):
        return f"unknown{like}"
    if owners := [tag for tag, owner in ARCHITECTURES.items() if name in _fields(owner)]:
        entry = _at(values, path[:-1])
        own = f", and this is {entry['architecture']}" if isinstance(entry, dict) and "architecture" in entry else ""
        return f"unknown; it is a field of {', '.join(owners)}{own}"
    return f"unknown; there are {', '.join(sorted(here))}"


def _names(kind: type, path: tuple, values: Any) -> set[str]:
    """The fields that there are at a path."""
    for step in path:
        hint = SAEConfig if isinstance(step, int) else get_type_hints(kind).get(step)
        hint = _optional(hint) or hint
        if dataclasses.is_dataclass(hint):
            kind = hint  # type: ignore[assignment]
        elif getattr(hint, "__origin__", None) is not tuple:
            return set()
    if kind is SAEConfig:
        return _fields(SAEConfig) | _fields(architecture_in_a_file(_at(values, path)["architecture"]))
    return _fields(kind)


def _fields(kind: Any) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def _at(values: Any, path: tuple) -> Any:
    for step in path:
        values = values[step] if isinstance(values, list) or step in values else {}
    return values


def _mend(values: Any, path: tuple) -> None:
    """Takes out what is at fault, and puts something in where something has to be."""
    entry = {"hook_name": "blocks.0.hook_resid_pre", "architecture": _DEFAULT}
    above = _at(values, path[:-1])
    if path == ("saes",):
        above["saes"] = [entry]
    elif path[0] == "saes" and len(path) == 2:
        above[path[1]] = entry
    elif path[-1] == "hook_name":
        above["hook_name"] = entry["hook_name"]
    elif isinstance(above, list):  # of numbers or words
        _mend(values, path[:-1])
    elif above is not None:
        above.pop(path[-1], None)


def _parts(kind: type, checked: Any, faults: list[tuple[str, str]], path: str) -> dict[str, Any]:
    """The arguments of a dataclass, from what pydantic made of the flat one; what its parts refuse is noted."""
    made = {}
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        value, below = getattr(checked, entry.name), f"{path}{entry.name}"
        hint = get_type_hints(kind)[entry.name]
        if dataclasses.is_dataclass(hint):
            value = _part(hint, value, faults, below)
        elif (part := _optional(hint)) is not None:
            value = value and _part(part, value, faults, below)
        elif entry.name == "other_models":
            one = hint.__args__[0]
            value = tuple(_part(one, inner, faults, f"{below}.{number}") for number, inner in enumerate(value))
        elif entry.name == "saes":
            value = tuple(_part(SAEConfig, inner, faults, f"{below}.{number}") for number, inner in enumerate(value))
        made[entry.name] = value
    return made


def _part(kind: Any, checked: Any, faults: list[tuple[str, str]], path: str) -> Any:
    if isinstance(checked, kind):  # a default
        return checked
    try:
        if kind is not SAEConfig:
            return kind(**_parts(kind, checked, faults, f"{path}."))
        values: dict[str, Any] = vars(checked)
        architecture: Architecture = TopKSAE(k=1)  # which asks nothing of the other fields
        others = {name: values[name] for name in _fields(SAEConfig) - {"architecture"}}
        owner = architecture_in_a_file(checked.architecture)
        try:
            architecture = owner(**{name: values[name] for name in _fields(owner)})
        except ConfigError as error:
            faults += error.below(path).faults
        return SAEConfig(architecture=architecture, **others)
    except ConfigError as error:
        faults += error.below(path).faults
        return None


# ------------------------------------------------------------------------------------------------ values


def _with_architectures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ``saes`` that name no architecture are those of the default one."""
    saes = values.get("saes")
    if not isinstance(saes, list | tuple):
        return dict(values)
    entries = [{"architecture": _DEFAULT, **entry} if isinstance(entry, Mapping) else entry for entry in saes]
    return {**values, "saes": entries}


def _with_mesh(values: Mapping[str, Any]) -> dict[str, Any]:
    """A number of processes is that of those over which latents are cut."""
    mesh = values.get("mesh")
    is_number = isinstance(mesh, int | float) and not isinstance(mesh, bool)
    return {**values, "mesh": {"latent": mesh}} if is_number else dict(values)


def _whole_numbers(value: Any) -> Any:
    """``5e6`` is a whole number, wherever one is wanted; where none is, the int is as good."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    return [_whole_numbers(inner) for inner in value] if isinstance(value, list | tuple) else value


def _set(values: Any, path: list[str], value: Any) -> None:
    """Puts a value at a path of names and numbers."""
    for step in range(len(path)):
        name, last = path[step], step == len(path) - 1
        said = ".".join(path[: step + 1])
        if isinstance(values, list):
            if not name.isdecimal() or int(name) >= len(values):
                raise ConfigError([(said, f"must be a number below {len(values)}: there are so many")])
            name = int(name)  # type: ignore[assignment]
        elif not isinstance(values, dict) or (not last and name not in values):
            known = values if isinstance(values, dict) else ()
            raise ConfigError([(said, f"unknown{nearest(name, known)}")])
        if not last:
            values = values[name]  # type: ignore[index]
        elif name == "architecture" and (old := _known(values.get(name))) and (new := _known(value)):
            for lost in _fields(old) - _fields(new):
                del values[lost]
            values[name] = value
        else:
            values[name] = value  # type: ignore[index]
