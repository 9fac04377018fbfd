"""Launch configurations by search: no candidate changes a result, and a table is asked for, whole, and read alike."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_engine import SparseCodes, _passes
from sae_engine import functional as f
from sae_engine.testing import assert_same, force_dense, same_bits
from sae_kernels import _autotune, _tuning, ops

B, F, D = 4, 520, 40


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    """Operations on codes gather, and no table of this machine takes part."""
    monkeypatch.setattr(_tuning, "DENSE_SHARE", force_dense(float("inf")))
    for name in ("SAE_AUTOTUNE", "SAE_AUTOTUNE_TABLE"):
        monkeypatch.delenv(name, raising=False)
    forget()


def forget():
    """As a new process."""
    _autotune._table.cache_clear()
    _autotune._settled.clear()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """SAE_AUTOTUNE=1 with a table of its own; ``calls`` counts what was timed, ``cost`` says how long it takes."""
    monkeypatch.setattr(_tuning, "SPLIT_ROWS", 0)  # row top-k is one launch then, and makes one choice
    path = tmp_path / "new" / "table.json"
    monkeypatch.setenv("SAE_AUTOTUNE", "1")
    monkeypatch.setenv("SAE_AUTOTUNE_TABLE", str(path))
    clock = SimpleNamespace(path=path, calls=0, cost=lambda forced: 1.0)

    def timer(call, device):
        clock.calls += 1  # the call itself would take its time in the interpreter; sweeps run every candidate
        session = _autotune._session.get()
        (name,) = session.forced.values()
        return clock.cost(name)

    monkeypatch.setattr(_autotune, "timer", timer)
    return clock


def entries(path):
    return json.loads(path.read_text())["entries"]


# --- no candidate changes a result ---------------------------------------------------------------------------------


def codes_of(pre, k):
    return f.topk(pre, k, backend="torch").detach()


def adam(pre, backend):
    """One step of Adam over the latent pass; what it leaves in parameters, moments and copies."""
    codes, generator = codes_of(pre, 5), torch.Generator(torch.get_default_device()).manual_seed(1)
    grad, x = torch.randn(B, D, generator=generator), torch.randn(B, D, generator=generator)
    shapes = [(pre.shape[1], D), (pre.shape[1], D), (pre.shape[1],)]
    state = [[torch.rand(shape, generator=generator) for shape in shapes] for _ in range(3)]
    term = _passes.term_of(codes, codes.values, grad, None, _passes.GATED)
    result = _passes.latent_adam(
        [term], x, None, *state, [], step=torch.tensor(3.0), lr=torch.tensor(0.1), betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.0, unit_rows=True, skip=None, backend=backend,
    )  # fmt: skip
    return [*state[0], *state[1], *state[2], *result]


def gradients(pre, backend):
    codes, generator = codes_of(pre, 20), torch.Generator(torch.get_default_device()).manual_seed(1)
    grad, x, weight = (torch.randn(n, D, generator=generator) for n in (B, B, pre.shape[1]))
    term = _passes.term_of(codes, codes.values, grad, None, _passes.GATED)
    return list(_passes.latent_gradients([term], x, weight, None, torch.float32, backend))


def decode(pre, backend):
    """The sum and both gradients."""
    codes, weight = codes_of(pre, 5), torch.linspace(-1, 1, pre.shape[1] * D).view(-1, D).sin()
    out = f.decode(codes, weight, backend=backend)
    entries = codes.values, codes.indices, codes.offsets
    return [  # called here: what a test forces is not known to the thread that autograd runs on a GPU
        out, ops.ops.decode_backward_values(2 * out, *entries, weight, backend),
        ops.ops.decode_backward_weight(2 * out, codes.values, *codes.by_latent, torch.float32, backend),
    ]  # fmt: skip


def budgets():
    return torch.arange(F, dtype=torch.int32) % 3


SELECTIONS = {
    "topk": lambda pre, backend: f.topk(pre, 5, backend=backend),
    "topk mask": lambda pre, backend: f.topk(pre, 5, mask=torch.arange(F) % 3 > 0, backend=backend),
    "topk magnitude": lambda pre, backend: f.topk(pre, 5, magnitude=True, backend=backend),
    "topk many": lambda pre, backend: f.topk(pre, 300, backend=backend),
    "batch_topk": lambda pre, backend: f.batch_topk(pre, 5, backend=backend),
    "batch_topk many": lambda pre, backend: f.batch_topk(pre, 300, backend=backend),
    "feature_topm": lambda pre, backend: f.feature_topm(pre, budgets()[: pre.shape[1]], backend=backend),
    "norm_match": lambda pre, backend: f.norm_match(pre, torch.full((len(pre),), 6.0), backend=backend),
    "threshold": lambda pre, backend: f.threshold(pre, 1.5, backend=backend),
}
SUMS = {"decode": decode, "latent_gradients": gradients, "latent_adam": adam}


def sample(name):
    """Ties, infinities and NaN among normal numbers; many rows where groups are of rows."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    shape = (200, 24) if name == "feature_topm" else (B, 60) if name in SUMS else (B, F)
    pre = torch.randn(shape, generator=generator)
    pre[:, ::7] = pre[:, ::7].round()
    if name in SELECTIONS and name != "norm_match":
        pre[1, 3], pre[2, 5], pre[3, 7] = float("nan"), float("inf"), -float("inf")
    return pre


def asked(call):
    """By each choice that a call asks for: what it could be told, less what differs in warps and stages alone, of
    which the interpreter knows nothing."""
    with _autotune.forcing({}) as session:
        call()
    found = {}
    for choice, args in session.asked.values():
        tiles = {}
        for chosen, configuration in choice.by_label(*args).items():
            if hasattr(configuration, "warps"):
                idle = [name for name in ("warps", "stages") if hasattr(configuration, name)]
                configuration = configuration._replace(**dict.fromkeys(idle, 0))
            elif isinstance(configuration, tuple):
                configuration = configuration[:1]
            tiles.setdefault(configuration, chosen)
        found[choice] = list(tiles.values())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_is_the_same_under_every_configuration(name, dtype):
    pre, select = sample(name).to(dtype), SELECTIONS[name]
    expected = select(pre, "reference")
    choices = asked(lambda: select(pre, "triton"))
    assert choices, "nothing is chosen"
    for choice, labels in choices.items():
        for chosen in labels if dtype == torch.float32 else labels[1::3]:
            with _autotune.forcing({choice.name: chosen}):
                found = select(pre, "triton")
            for ours, right in zip((found.indices, found.offsets, found.values),
                                   (expected.indices, expected.offsets, expected.values), strict=True):  # fmt: skip
                assert torch.equal(ours, right) or same_bits(ours, right), (choice.name, chosen)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_the_same_to_rounding_under_every_configuration(name):
    pre, run = sample(name), SUMS[name]
    expected = run(pre, "reference")
    for choice, labels in asked(lambda: run(pre, "triton")).items():
        for chosen in labels:
            with _autotune.forcing({choice.name: chosen}):
                found = run(pre, "triton")
            for ours, right in zip(found, expected, strict=True):  # 5 terms of size 1, in any order: a few roundings
                torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5, msg=f"{choice.name}: {chosen}")


def test_every_choice_is_swept():
    reached = set()
    for name, call in {**SELECTIONS, **SUMS}.items():
        reached |= {choice.name for choice in asked(lambda call=call, name=name: call(sample(name), "triton"))}
    assert reached == set(_autotune.CHOICES)


def test_candidates_differ_and_the_default_comes_first():
    found = _autotune.CHOICES["batch_groups"].by_label(4096, 32768, 4096 * 32)
    assert len(found) > 5 and len(set(found.values())) == len(found)
    assert next(iter(found.values())) == _tuning.batch_groups(4096, 32768, 4096 * 32)
    assert all(c.block % c.size == 0 and c.number == 32768 // c.size for c in found.values())
    assert _autotune.CHOICES["row_groups"].by_label(40, 30) == {}  # no groups: another kernel


# --- off, unless asked for -----------------------------------------------------------------------------------------


def test_nothing_runs_unless_asked_for(monkeypatch):
    monkeypatch.setattr(_autotune, "run", lambda *_, **__: pytest.fail("autotuning ran"))
    for value in ("", "0"):
        monkeypatch.setenv("SAE_AUTOTUNE", value)
        f.topk(torch.randn(B, F), 5, backend="triton")
    monkeypatch.setenv("SAE_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="SAE_AUTOTUNE must be 0 or 1"):
        f.topk(torch.randn(B, F), 5, backend="triton")


def test_no_search_in_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_AUTOTUNE", "1")
    monkeypatch.setenv("SAE_AUTOTUNE_TABLE", str(tmp_path / "table.json"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="SAE_AUTOTUNE=1 compares times on a GPU"):
            f.topk(torch.randn(B, F), 5, backend="triton")
    f.topk(torch.randn(B, F), 5, backend="torch")  # has no launch configurations
    assert not (tmp_path / "table.json").exists()


def test_a_table_alone_searches_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_AUTOTUNE_TABLE", str(tmp_path / "table.json"))
    monkeypatch.setattr(_autotune, "timer", lambda *_: pytest.fail("something was timed"))
    assert_same(f.topk(sample("topk"), 5, backend="triton").indices, f.topk(sample("topk"), 5, backend="torch").indices)
    assert not (tmp_path / "table.json").exists()


def test_several_processes_do_not_search(table, monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(RuntimeError, match="sae-engine tune"):
        f.topk(torch.randn(B, F), 5, backend="triton")
    assert table.calls == 0 and not table.path.exists()


# --- the search ----------------------------------------------------------------------------------------------------


def chosen_in(call):
    """What a call launches with, by choice."""
    used = {}

    def note(self, choice, args, choose=_autotune._Session.choose):
        used[choice.name] = result = choose(self, choice, args)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autotune._Session, "choose", note)
        call()
    return used


def test_the_fastest_is_found_written_and_used(table, monkeypatch):
    pre = sample("topk")
    labels = list(_autotune.CHOICES["row_groups"].by_label(F, 5))
    table.cost = lambda name: 0.5 if name == labels[-1] else 1.0
    call = lambda: f.topk(pre, 5, backend="triton")  # noqa: E731
    expected = f.topk(pre, 5, backend="reference")
    assert_same(call().indices, expected.indices)
    (entry,) = entries(table.path)
    assert entry["operation"] == "row_topk.launch" and entry["dtype"] == "float32" and entry["batch"] == B
    assert (entry["choice"], entry["arguments"], entry["configuration"]) == ("row_groups", [F, 5], labels[-1])
    assert (entry["ms"], entry["default_ms"]) == (0.5, 1.0)
    assert table.calls == 2 * len(labels)
    assert [path.name for path in table.path.parent.iterdir()] == ["table.json"]

    assert _autotune.label(chosen_in(call)["row_groups"]) == labels[-1] and table.calls == 2 * len(labels)
    forget()
    monkeypatch.delenv("SAE_AUTOTUNE")  # another process, which only reads
    assert _autotune.label(chosen_in(call)["row_groups"]) == labels[-1]
    assert_same(call().indices, expected.indices)
    forget()
    monkeypatch.delenv("SAE_AUTOTUNE_TABLE")  # and one that does not ask
    assert chosen_in(call) == {}


def test_what_is_hardly_faster_does_not_replace_the_default(table):
    labels = list(_autotune.CHOICES["row_groups"].by_label(F, 5))
    table.cost = lambda name: 1.0 if name == labels[0] else 0.98
    f.topk(sample("topk"), 5, backend="triton")
    assert entries(table.path)[0]["configuration"] == labels[0]


def test_choices_that_follow_from_others_are_searched_too(table):
    """decode_warps is asked with the tile that was found."""
    table.cost = lambda name: 0.5 if name == "32" else 1.0
    codes = codes_of(sample("decode"), 5)
    f.decode(codes, torch.randn(codes.num_latents, D), backend="triton")
    found = {entry["choice"]: entry for entry in entries(table.path)}
    assert found["decode_block"]["configuration"] == "32" and found["decode_block"]["arguments"] == [D]


def test_a_configuration_that_does_not_fit_is_passed_over(table):
    from triton.runtime.errors import OutOfResources

    labels = list(_autotune.CHOICES["row_groups"].by_label(F, 5))
    too_large = set(labels[1:])

    def cost(name):
        if name in too_large:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    table.cost = cost
    f.topk(sample("topk"), 5, backend="triton")
    assert entries(table.path)[0]["configuration"] == labels[0] and table.calls == len(labels) + 1
    too_large.add(labels[0])
    with pytest.raises(OutOfResources):
        f.topk(torch.randn(B, F), 6, backend="triton")


@pytest.mark.parametrize("name", ["topk", "batch_topk", "threshold", "norm_match"])
def test_a_smaller_batch_never_searches_again(table, name):
    select = SELECTIONS[name]
    select(torch.randn(8, 130), "triton")
    before, stored = table.calls, entries(table.path)
    assert before
    for rows in (8, 7, 5, 1):
        pre = torch.randn(rows, 130)
        assert_same(select(pre, "triton").indices, select(pre, "reference").indices)
    assert table.calls == before and entries(table.path) == stored
    select(torch.randn(9, 130), "triton")
    assert table.calls > before


def test_an_operation_that_trains_is_not_trained_by_its_search(table, monkeypatch):
    pre = sample("latent_adam")
    searched = adam(pre, "triton")
    assert table.calls > 0
    for name in ("SAE_AUTOTUNE", "SAE_AUTOTUNE_TABLE"):
        monkeypatch.delenv(name)
    for ours, right in zip(searched, adam(pre, "triton"), strict=True):
        assert_same(ours, right)  # equal times: the default stayed


def test_operations_in_place_are_known_by_name():
    names = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("sae_engine::")}  # fmt: skip
    mutable = {name for name in names if getattr(ops.ops, name).default._schema.is_mutable}
    assert mutable == {*ops.IN_PLACE, "move_threshold"}  # which has no launcher


# --- the table -----------------------------------------------------------------------------------------------------


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": 1, "kernels": _autotune.fingerprint(), "entries": []} | changes))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "damaged"),
        ('{"format": 1, "kernels"', "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged"),
        ({"format": 2}, "other kernels"),
        ({"kernels": "0123456789abcdef"}, "other kernels"),
        ({"entries": [{"operation": "row_topk.launch"}]}, "damaged"),
        ({"entries": 3}, "damaged"),
    ],
    ids=str,
)
def test_a_damaged_or_foreign_table_is_named_and_not_used(tmp_path, monkeypatch, text, match):
    path = tmp_path / "table.json"
    if isinstance(text, dict):
        write(path, **text)
    else:
        path.write_text(text)
    monkeypatch.setenv("SAE_AUTOTUNE_TABLE", str(path))
    before = path.read_text()
    with pytest.raises(RuntimeError, match=rf"table\.json.*{match}"):
        f.topk(torch.randn(B, F), 5, backend="triton")
    assert path.read_text() == before


def test_a_configuration_that_there_is_not_is_refused(table, monkeypatch):
    f.topk(torch.randn(B, F), 5, backend="triton")
    (entry,) = entries(table.path)
    write(table.path, entries=[entry | {"configuration": "size=3 block=48 warps=5"}])
    monkeypatch.delenv("SAE_AUTOTUNE")
    forget()
    with pytest.raises(RuntimeError, match=r"row_groups\(520, 5\) has no configuration 'size=3"):
        f.topk(torch.randn(B, F), 5, backend="triton")


def test_tables_of_other_dtypes_and_architectures_do_not_apply(table, monkeypatch):
    f.topk(torch.randn(B, F), 5, backend="triton")
    (entry,) = entries(table.path)
    labels = list(_autotune.CHOICES["row_groups"].by_label(F, 5))
    others = [{"dtype": "bfloat16"}, {"arch": entry["arch"] + "0"}, {"operation": "encode.launch"},
              {"arguments": [F, 6]}, {"batch": B // 2}]  # fmt: skip
    write(table.path, entries=[entry | {"configuration": labels[-1]} | other for other in others])
    monkeypatch.delenv("SAE_AUTOTUNE")
    forget()
    used = chosen_in(lambda: f.topk(torch.randn(B, F), 5, backend="triton"))
    assert _autotune.label(used["row_groups"]) == labels[0]


def test_what_another_process_has_found_stays(table):
    f.topk(torch.randn(B, F), 5, backend="triton")
    (entry,) = entries(table.path)
    write(table.path, entries=[entry | {"dtype": "float64"}])  # meanwhile, in another process
    f.topk(torch.randn(B, F), 6, backend="triton")
    kept = [(e["dtype"], e["arguments"]) for e in entries(table.path)]
    assert sorted(kept) == [("float32", [F, 5]), ("float32", [F, 6]), ("float64", [F, 5])]


def test_a_failed_write_leaves_the_old_table(table, monkeypatch):
    f.topk(torch.randn(B, F), 5, backend="triton")
    before = table.path.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_autotune.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        f.topk(torch.randn(B, F), 6, backend="triton")
    assert table.path.read_text() == before and list(table.path.parent.iterdir()) == [table.path]


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _autotune.default_path() == tmp_path / "sae-engine" / f"autotune-{_autotune.fingerprint()}.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _autotune.default_path().parent == Path.home() / ".cache" / "sae-engine"


def test_two_processes_with_one_table_choose_alike(table, monkeypatch, tmp_path):
    labels = list(_autotune.CHOICES["row_groups"].by_label(F, 5))
    table.cost = lambda name: 0.5 if name == labels[2] else 1.0
    f.topk(torch.randn(8, F), 5, backend="triton")
    code = f"""
import torch
from sae_engine import functional as f
from sae_kernels import _autotune, _tuning, ops
_tuning.SPLIT_ROWS = 0
choose = _autotune._Session.choose
_autotune._Session.choose = lambda *args: print(_autotune.label(found := choose(*args))) or found
f.topk(torch.randn(5, {F}, device="{torch.get_default_device()}"), 5, backend="triton")
"""
    import os

    environment = {**os.environ, "SAE_AUTOTUNE": "0", "SAE_AUTOTUNE_TABLE": str(table.path)}
    shown = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert shown == [f"{labels[2]}\n"] * 2


def test_codes_made_from_parts_are_untouched():
    """A value that is no tensor list, and a batch of nothing, pass through."""
    empty = SparseCodes.from_topk(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), F)
    assert f.decode(empty, torch.randn(F, D), backend="triton").shape == (0, D)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_fills_a_table_for_all_operations(table, monkeypatch):
    from sae_engine import _tune

    monkeypatch.delenv("SAE_AUTOTUNE")
    said = []
    shape, device = _tune.Shape.parse("8,12,90,3"), torch.get_default_device()
    path, found = _tune.tune([shape], ["fp32"], device, table.path, said.append)
    assert path == table.path and found == entries(path)
    assert {entry["operation"].partition(".")[0] for entry in found} >= {
        "row_topk", "batch_topk", "feature_topm", "norm_match", "threshold", "decode", "latent_pass"
    }  # fmt: skip
    assert all("B=8 d=12 F=90 k=3, fp32" in line for line in said) and len(said) == 9
    before = table.calls
    _tune.tune([shape], ["fp32"], device, table.path, said.append)
    assert table.calls == before


@pytest.mark.parametrize("text", ["4096", "1,2,3", "1,2,3,x", "0,2,3,1", "4,4,4,5"])
def test_a_bad_shape_is_explained(text):
    from sae_engine import cli

    assert cli.main(["tune", text, "--device", "cpu"]) == 1


def test_the_command_needs_a_gpu(capsys, tmp_path):
    from sae_engine import cli

    assert cli.main(["tune", "--device", "cpu", "--table", str(tmp_path / "table.json")]) == 1
    assert "compares times on a GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
