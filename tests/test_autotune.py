"""Launch configurations from tables: no candidate changes a result; a table applies or is refused; `tune` fills it."""
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tune
from density import force_dense

from sae_engine import SparseCodes, TopK
from sae_engine import functional as f
from sae_engine.testing import assert_same, assert_within_budget, same_bits
from sae_kernels import ops
from sae_kernels.device import _autotune, _tuning
from sae_kernels.operations import OPERATIONS, in_fp64
from sae_kernels.stock import densified

B, F, D = 4, 520, 40


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    """Operations on codes gather, and no table of this machine takes part."""
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(float("inf")))
    monkeypatch.delenv("SAE_AUTOTUNE_TABLE", raising=False)
    _autotune._table.cache_clear()


# --- no candidate changes a result ---------------------------------------------------------------------------------


def codes_of(pre, k):
    return f.topk(pre, k, backend="torch").detach()


def of_row(name):
    """Every tensor that a call of the operation leaves, by back end; the same numbers in fp64 by ``None``."""
    row = OPERATIONS[name]
    args = row.example(SimpleNamespace(B=B, d=D, F=24, k=20), torch.float32, torch.get_default_device())

    def run(backend):
        given = row.apart(in_fp64(args) if backend is None else args)
        return row.outcome(getattr(ops.ops, name)(*given, backend or "reference"), given)

    return run


def budgets():
    return torch.arange(F, dtype=torch.int32) % 3


def topk_in_slabs(pre, backend):
    running = TopK(5).running(len(pre), F, backend=backend)
    for latents in (slice(0, 260), slice(260, F)):
        running.add(pre[:, latents], slice(0, len(pre)), latents)
    return running.finish()[0]


SELECTIONS = {
    "topk": lambda pre, backend: f.topk(pre, 5, backend=backend),
    "topk in slabs": topk_in_slabs,
    "topk mask": lambda pre, backend: f.topk(pre, 5, mask=torch.arange(F) % 3 > 0, backend=backend),
    "topk magnitude": lambda pre, backend: f.topk(pre, 5, magnitude=True, backend=backend),
    "batch_topk": lambda pre, backend: f.batch_topk(pre, 5, backend=backend),
    "batch_topk many": lambda pre, backend: f.batch_topk(pre, 300, backend=backend),
    "feature_topm": lambda pre, backend: f.feature_topm(pre, budgets()[: pre.shape[1]], backend=backend),
    "norm_match": lambda pre, backend: f.norm_match(pre, torch.full((len(pre),), 6.0), backend=backend),
    "threshold": lambda pre, backend: f.threshold(pre, 1.5, backend=backend),
}
SUMS = [name for name, row in OPERATIONS.items() if not row.is_exact]


def sample(name):
    """Ties, infinities and NaN among normal numbers; many rows where groups are of rows."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    shape = (200, 24) if name == "feature_topm" else (2, F)
    pre = torch.randn(shape, generator=generator)
    pre[:, ::7] = pre[:, ::7].round()
    if name != "norm_match":
        pre[0, 3], pre[1, 5], pre[1, 7] = float("nan"), float("inf"), -float("inf")
    return pre


def asked(call):
    """By each choice that a call asks for: what it could be told, less what differs in warps and stages alone, of
    which the interpreter knows nothing."""
    session = _autotune.Forced({})
    with _autotune.choosing(session):
        call()
    found = {}
    for choice, args in session.asked.items():
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


@functools.cache
def choices_of(name, dtype=torch.float32):
    """What :func:`asked` says of an operation; it is asked once."""
    if name in SELECTIONS:
        return asked(lambda: SELECTIONS[name](sample(name).to(dtype), "triton"))
    return asked(lambda: of_row(name)("triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_is_the_same_under_every_configuration(name, dtype):
    pre, select = sample(name).to(dtype), SELECTIONS[name]
    expected = select(pre, "reference")
    choices = choices_of(name, dtype)
    assert choices, "nothing is chosen"
    shared_out = {torch.bfloat16: lambda labels: labels[1::3],  # each of them in one of the types
                  torch.float32: lambda labels: [label for label in labels if label not in labels[1::3]]}  # fmt: skip
    for choice, labels in choices.items():
        for chosen in shared_out[dtype](labels):
            with _autotune.choosing(_autotune.Forced({choice.name: chosen})):
                found = select(pre, "triton")
            for ours, right in zip((found.indices, found.offsets, found.values),
                                   (expected.indices, expected.offsets, expected.values), strict=True):  # fmt: skip
                assert torch.equal(ours, right) or same_bits(ours, right), (choice.name, chosen)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_the_same_to_rounding_under_every_configuration(name):
    run = of_row(name)
    truth, honest = run(None), run("reference")
    for choice, labels in choices_of(name).items():
        for chosen in labels:
            with _autotune.choosing(_autotune.Forced({choice.name: chosen})):
                found = run("triton")
            for ours, exact, yardstick in zip(found, truth, honest, strict=True):
                assert_within_budget(ours, exact, yardstick)


def test_every_choice_is_swept():
    assert {choice.name for name in (*SELECTIONS, *SUMS) for choice in choices_of(name)} == set(_autotune.CHOICES)


def test_candidates_differ_and_the_default_comes_first():
    found = _autotune.CHOICES["batch_groups"].by_label(4096, 32768, 4096 * 32)
    assert len(found) > 5 and len(set(found.values())) == len(found)
    assert next(iter(found.values())) == _tuning.batch_groups(4096, 32768, 4096 * 32)
    assert all(c.block % c.size == 0 and c.number == 32768 // c.size for c in found.values())
    assert _autotune.CHOICES["row_groups"].by_label(40, 30) == {}  # no groups: another kernel


# --- the table -----------------------------------------------------------------------------------------------------

ENTRY = {"operation": "row_topk.launch", "dtype": "float32", "choice": "row_groups", "arguments": [F, 5], "batch": B,
         "ms": 0.5, "default_ms": 1.0}  # fmt: skip


def labels_of(k=5):
    return list(_autotune.CHOICES["row_groups"].by_label(F, k))


def write(path, **changes):
    path.write_text(json.dumps({"format": 1, "kernels": _autotune.fingerprint(), "entries": []} | changes))


def entries(path):
    return json.loads(path.read_text())["entries"]


@pytest.fixture
def one_choice(monkeypatch):
    """Row top-k is one launch then, and makes one choice."""
    monkeypatch.setattr(_tuning, "SPLIT_ROWS", 0)


@pytest.fixture
def table(tmp_path, monkeypatch, one_choice):
    """Writes a table of ENTRY with each of these changes, and has it applied as in a new process."""
    entry = ENTRY | {"arch": _autotune._architecture(torch.randn(1).device), "configuration": labels_of()[-1]}

    def apply(*changes):
        path = tmp_path / "table.json"
        write(path, entries=[entry | change for change in changes])
        monkeypatch.setenv("SAE_AUTOTUNE_TABLE", str(path))
        _autotune._table.cache_clear()

    return apply


def top(rows, k=5):
    """The groups with which so many rows are selected from, by their label; what is selected is right."""
    used = {}

    def note(self, choice, args, choose=_autotune.Session.choose):
        used[choice.name] = result = choose(self, choice, args)
        return result

    pre = torch.randn(rows, F)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autotune.Session, "choose", note)
        found = f.topk(pre, k, backend="triton")
    assert_same(found.indices, f.topk(pre, k, backend="reference").indices)
    return _autotune.label(used["row_groups"]) if used else None


def test_a_table_applies_only_where_it_is_named(table, monkeypatch):
    assert top(B) is None
    table({})
    assert top(B) == labels_of()[-1] != labels_of()[0]
    assert top(B, k=6) == labels_of(6)[0]  # which it lacks
    empty = SparseCodes.from_topk(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), F)
    assert f.decode(empty, torch.randn(F, D), backend="triton").shape == (0, D)
    monkeypatch.setenv("SAE_AUTOTUNE_TABLE", "")
    assert top(B) is None


def test_a_smaller_batch_takes_the_next_larger_ones_entry(table):
    first, *_, middle, last = labels_of()
    table({"batch": 16}, {"batch": 4, "configuration": middle})
    assert [top(rows) for rows in (1, 4, 5, 16, 17)] == [middle, middle, last, last, first]


def test_plans_belong_to_the_table_that_they_were_made_with(table):
    pre, launched = torch.randn(B, F), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autotune.Session, "choose", lambda self, choice, args: launched.append(choice.name)
                      or choice.default(*args))  # fmt: skip
        f.topk(pre, 5, backend="triton")
        assert launched == []
        table({})
        for _ in range(2):
            f.topk(pre, 5, backend="triton")
    assert launched == ["row_groups"]


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


def test_a_configuration_that_there_is_not_is_refused(table):
    table({"configuration": "size=3 block=48 warps=5"})
    with pytest.raises(RuntimeError, match=r"row_groups\(520, 5\) has no configuration 'size=3"):
        top(B)


def test_tables_of_other_dtypes_and_architectures_do_not_apply(table):
    table({"dtype": "bfloat16"}, {"arch": "sm_900"}, {"operation": "encode.launch"}, {"arguments": [F, 6]},
          {"batch": B // 2})  # fmt: skip
    assert top(B) == labels_of()[0]


# --- the search ----------------------------------------------------------------------------------------------------


@pytest.fixture
def search(tmp_path, one_choice):
    """Searches on behalf of a call, into a table; ``cost`` says how long a configuration takes, ``calls`` how often."""
    clock = SimpleNamespace(path=tmp_path / "new" / "table.json", calls=0, cost=lambda forced: 1.0)

    def timer(call, device):
        clock.calls += 1  # the call itself would take its time in the interpreter; sweeps run every candidate
        (name,) = _autotune._session.get().forced.values()
        return clock.cost(name)

    def run(call):
        with _autotune.searching(_autotune.Table(clock.path), functools.partial(tune.fill, timer)):
            call()
        return entries(clock.path)

    clock.timer, clock.run = timer, run
    rows = sample("topk").repeat(B // 2, 1)
    clock.topk = lambda k=5: run(lambda: f.topk(rows, k, backend="triton"))
    return clock


def test_the_fastest_is_found_written_and_used(search, monkeypatch):
    labels = labels_of()
    search.cost = lambda name: 0.5 if name == labels[-1] else 1.0
    (entry,) = search.topk()
    assert entry == ENTRY | {"arch": entry["arch"], "configuration": labels[-1]}
    assert search.calls == 2 * len(labels)
    assert [path.name for path in search.path.parent.iterdir()] == ["table.json"]
    assert search.topk() == [entry] and search.calls == 2 * len(labels)  # it is known by now
    monkeypatch.setenv("SAE_AUTOTUNE_TABLE", str(search.path))
    assert top(B) == labels[-1]


def test_what_is_hardly_faster_does_not_replace_the_default(search):
    labels = labels_of()
    search.cost = lambda name: 1.0 if name == labels[0] else 0.98
    assert search.topk()[0]["configuration"] == labels[0]


def test_choices_that_follow_from_others_are_searched_too(search):
    """decode_warps is asked with the tile that was found, 32 columns, not with the default's 64."""
    search.cost = lambda name: 0.5 if name == "32" else 1.0
    codes = codes_of(torch.randn(B, 60), 5)
    found = search.run(lambda: f.decode(codes, torch.randn(codes.num_latents, D), backend="triton"))
    assert {entry["choice"]: entry["configuration"] for entry in found}["decode_block"] == "32"
    asked = {tuple(entry["arguments"]) for entry in found if entry["choice"] == "decode_warps"}
    assert asked == {(32,)}


def test_a_configuration_that_does_not_fit_is_passed_over(search):
    from triton.runtime.errors import OutOfResources

    labels = labels_of()
    too_large = set(labels[1:])

    def cost(name):
        if name in too_large:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    search.cost = cost
    assert search.topk()[0]["configuration"] == labels[0] and search.calls == len(labels) + 1
    too_large.add(labels[0])
    with pytest.raises(OutOfResources):
        search.topk(6)


def test_what_another_process_has_found_stays(search):
    (entry,) = search.topk()
    other, call = entry | {"dtype": "float64"}, lambda: f.topk(sample("topk"), 6, backend="triton")

    def meanwhile():
        write(search.path, entries=[other])
        call()

    assert sorted((e["dtype"], e["arguments"]) for e in search.run(meanwhile)) == [
        ("float32", [F, 5]), ("float32", [F, 6]), ("float64", [F, 5])
    ]  # fmt: skip


def test_a_failed_write_leaves_the_old_table(search, monkeypatch):
    search.topk()
    before = search.path.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_autotune.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.topk(6)
    assert search.path.read_text() == before and list(search.path.parent.iterdir()) == [search.path]


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune.default_path() == tmp_path / "sae-engine" / f"autotune-{_autotune.fingerprint()}.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tune.default_path().parent == Path.home() / ".cache" / "sae-engine"


def test_the_command_fills_a_table_for_all_operations(search):
    said, shape, device = [], tune.Shape.parse("4,12,60,3"), torch.get_default_device()
    path, found = tune.tune([shape], ["fp32"], device, search.path, said.append, search.timer)
    assert path == search.path and found == entries(path)
    assert {entry["operation"].removesuffix(".launch") for entry in found} >= {
        "row_topk", "batch_topk", "feature_topm", "norm_match", "threshold", "decode", "backward.launch_weight",
        "latent_pass.launch_gradients", "latent_pass.launch_adam",
    }  # fmt: skip
    assert all("B=4 d=12 F=60 k=3, fp32" in line for line in said) and len(said) == len(OPERATIONS)


@pytest.mark.parametrize("text", ["4096", "1,2,3", "1,2,3,x", "0,2,3,1", "4,4,4,5"])
def test_a_bad_shape_is_explained(text):
    assert tune.main([text, "--device", "cpu"]) == 1


def test_the_command_needs_a_gpu(capsys, tmp_path):
    assert tune.main(["--device", "cpu", "--table", str(tmp_path / "table.json")]) == 1
    assert "compares times on a GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
