"""`hf-epimer diagnose`: its numbers against their definitions, its words against its rules, and what it writes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from helpers import reference
from helpers.checkpoints import TINY, rewrite, write_checkpoint
from helpers.command import Run, contents, fails
from hf_epimer import EpiMerConfig, MergeRecipe, ModelRef, diagnose, merge_state_dicts
from hf_epimer.analysis import plots as plots
from hf_epimer.analysis.diagnosis import LayerDiagnosis, diagnose_layers, rank_totals
from hf_epimer.analysis.verdict import RankTotals, verdict
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.models.clip import CLIP
from hf_epimer.numerics.diagnostics import CurvatureDiagnosis, cosines, kept_energy
from hf_epimer.numerics.linalg import extreme_eigenvalues
from hf_epimer.numerics.subspace import projected_coordinates, tagged_basis, task_triples, whitened_basis

TASKS, M, N = 3, 40, 30
WEIGHTS = [0.2, 0.3, 0.5]


def problem(tasks: int = TASKS) -> tuple[Tensor, Tensor]:
    """Task vectors with a decaying spectrum and curvatures of unlike size and shape."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(tasks, M, 12, generator=generator), torch.randn(tasks, 12, N, generator=generator)
    deltas = factors[0] @ factors[1] + 0.3 * torch.randn(tasks, M, N, generator=generator)
    rows, columns = torch.randn(tasks, M, 1, generator=generator), torch.randn(tasks, 1, N, generator=generator)
    noise = 0.5 * torch.randn(tasks, M, N, generator=generator)
    sizes = torch.arange(1.0, tasks + 1).view(-1, 1, 1)
    return 0.01 * deltas, 1e-6 * sizes * (rows + columns + noise).exp()


def layers_of(
    deltas: Tensor, curvature: Tensor | None, ranks: list[int], weights: list[float] | None = None, exact: bool = False
) -> LayerDiagnosis:
    """One matrix named w, as `diagnose` sees it."""
    base = StateDict("base", {"w": torch.zeros(deltas.shape[1:])})
    models = [StateDict(str(task), {"w": own}) for task, own in enumerate(deltas)]
    measured = None if curvature is None else [StateDict("", {"w": own}) for own in curvature]
    ingredients = Ingredients(base, models, weights or [1 / len(deltas)] * len(deltas), measured)
    (found,) = diagnose_layers(ingredients, ranks, exact=exact)
    return found


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_every_quantity_against_the_dense_reference(exact: bool) -> None:
    deltas, curvature = problem()
    found = layers_of(deltas, curvature, [2, 5, 64], WEIGHTS, exact)
    assert found.at[64].rank == N // TASKS
    tolerance = 1e-8 if exact else 2e-3
    for rank, own in found.at.items():
        expected = reference.diagnosis(list(deltas), list(curvature), rank=rank, weights=WEIGHTS)
        assert own.atoms == TASKS * own.rank
        assert own.kept == pytest.approx(expected["kept"], rel=1e-4)
        assert own.singular == pytest.approx(expected["singular"], rel=1e-4)
        assert own.isotropy == pytest.approx(expected["isotropy"], rel=5e-3)
        assert own.curvature is not None
        for name in ("eta", "spread", "eta_trace", "spread_trace", "variance", "residual", "loss", "bound", "traces"):
            assert getattr(own.curvature, name) == pytest.approx(expected[name], rel=tolerance), (rank, name)
    cosine = torch.nn.functional.cosine_similarity(deltas.flatten(1)[:, None], deltas.flatten(1)[None], dim=2)
    assert torch.allclose(cosines(found.gram).float(), cosine, atol=1e-6)
    assert found.norms == pytest.approx(deltas.flatten(1).norm(dim=1).tolist())


def test_eta_is_what_the_frechet_mean_saves_and_v_s_what_it_leaves() -> None:
    """F(c_bar) - F(x) = eta; all three come from different computations."""
    deltas, curvature = problem()
    for own in layers_of(deltas, curvature, [3, 8], WEIGHTS, exact=True).at.values():
        assert own.curvature
        assert own.curvature.spread - own.curvature.variance == pytest.approx(own.curvature.eta, rel=1e-9)
        assert 0 < own.curvature.share < 1
        assert own.curvature.loss < own.curvature.bound


def test_equal_curvatures_have_no_eta_and_a_flat_one_is_isotropic() -> None:
    deltas, curvature = problem()
    same = layers_of(deltas, curvature[:1].expand(TASKS, -1, -1), [4], exact=True).at[4]
    assert same.curvature
    assert same.curvature.share < 1e-12
    sizes = torch.tensor([1.0, 2.0, 7.0]).view(-1, 1, 1)
    flat = layers_of(deltas, 1e-6 * sizes.expand(TASKS, M, N), [4]).at[4]
    assert flat.isotropy < 1e-3
    assert flat.curvature
    assert flat.curvature.share > 0.01  # unlike sizes alone make a weighted mean
    assert flat.curvature.share_trace < 1e-6
    assert [own / sum(flat.curvature.traces) for own in flat.curvature.traces] == pytest.approx([0.1, 0.2, 0.7])


def test_lower_ranks_come_from_one_decomposition() -> None:
    deltas, _ = problem()
    triples = task_triples(deltas.double(), 10, exact=True)
    for rank in (1, 4, 10):
        leading, direct = whitened_basis(triples, rank), tagged_basis(deltas.double(), rank, exact=True)
        assert leading is not None
        assert direct is not None
        x = torch.arange(1.0, leading.size + 1, dtype=torch.float64)
        assert torch.allclose(leading.expand(x), direct.expand(x), atol=1e-10)
        assert torch.equal(leading.tags, direct.tags)


def test_the_order_of_tasks_does_not_matter() -> None:
    deltas, curvature = problem()
    order = [2, 0, 1]
    plain = layers_of(deltas, curvature, [4], WEIGHTS).at[4]
    mixed = layers_of(deltas[order], curvature[order], [4], [WEIGHTS[task] for task in order]).at[4]
    assert plain.curvature
    assert mixed.curvature
    assert mixed.kept == pytest.approx([plain.kept[task] for task in order], rel=1e-5)
    assert mixed.isotropy == pytest.approx(plain.isotropy, rel=5e-3)
    assert mixed.curvature.traces == pytest.approx([plain.curvature.traces[task] for task in order], rel=1e-5)
    for name in ("eta", "spread", "eta_trace", "spread_trace", "variance", "residual", "loss"):
        assert getattr(mixed.curvature, name) == pytest.approx(getattr(plain.curvature, name), rel=1e-3), name


def test_one_checkpoint_twice_keeps_what_one_keeps() -> None:
    deltas, curvature = problem(1)
    once, twice = (tagged_basis(torch.cat([deltas] * copies), 5) for copies in (1, 2))
    assert once is not None
    assert twice is not None
    alone = kept_energy(once, projected_coordinates(once, deltas))
    assert torch.allclose(kept_energy(twice, projected_coordinates(twice, deltas)), alone, rtol=1e-3)
    found = layers_of(torch.cat([deltas] * 2), torch.cat([curvature] * 2), [5]).at[5]
    assert found.curvature
    assert found.curvature.share < 1e-6


def test_unchanged_and_curvature_free_layers_are_left_out_quietly() -> None:
    deltas, curvature = problem()
    deltas[1] = 0
    found = layers_of(deltas, curvature, [4])
    assert found.at[4].kept[1] == found.at[4].singular[1] == 0
    assert cosines(found.gram)[0].isnan().tolist() == [False, True, False]
    assert math.isnan(rank_totals([found], 4).kept[1])
    nothing = layers_of(torch.zeros_like(deltas), curvature, [4])
    assert nothing.at == {}
    assert nothing.mean is not None
    assert nothing.mean.bound == 0
    blind = layers_of(deltas, torch.zeros_like(curvature), [4]).at[4]
    assert blind.curvature is not None
    assert (blind.curvature.share, blind.curvature.bound) == (0, 0)
    assert math.isnan(blind.isotropy)
    assert layers_of(deltas, None, [4]).at[4].curvature is None


def test_the_ends_of_a_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    values = torch.cat([torch.linspace(0.5, 2, 299), torch.tensor([9.0])]).double()
    matrix = (q * values) @ q.mT
    start = torch.randn(300, generator=generator, dtype=torch.float64)
    assert extreme_eigenvalues(lambda x: matrix @ x, start) == pytest.approx((0.5, 9.0), abs=1e-2)
    small = matrix[:20, :20]
    ends = torch.linalg.eigvalsh(small)[[0, -1]].tolist()
    assert extreme_eigenvalues(lambda x: small @ x, start[:20], tolerance=0) == pytest.approx(ends, rel=1e-9)
    assert extreme_eigenvalues(lambda x: 3 * x, start) == pytest.approx((3, 3))


# --- Theorem 2 on a loss that is what the theorem assumes -----------------------------------------------------------


NET = {"first.weight": (18, 14), "first.bias": (18,), "second.weight": (16, 12)}


class QuadraticTask:
    """Two linear layers and a bias, fed one coordinate at a time: the loss is quadratic and its Hessian diagonal."""

    def __init__(self, optimum: dict[str, Tensor], generator: torch.Generator) -> None:
        self.optimum = optimum
        self.inputs = {name: torch.rand(shape[-1], generator=generator).double() for name, shape in NET.items()}
        noise = {name: torch.randn(shape[0], generator=generator).double() for name, shape in NET.items()}
        self.steepness = {name: value.exp() for name, value in noise.items()}

    def loss(self, state: dict[str, Tensor]) -> Tensor:
        """1/2 sum over inputs of the squared errors of all outputs, each with its own steepness."""
        total = torch.zeros((), dtype=torch.float64)
        for name, best in self.optimum.items():
            errors = state[name] - best
            outputs = errors @ torch.diag(self.inputs[name]) if errors.ndim == 2 else errors[:, None]
            total = total + 0.5 * (self.steepness[name][:, None] * outputs.square()).sum()
        return total

    def hessian(self) -> dict[str, Tensor]:
        """Its diagonal, by automatic differentiation; the rest is checked to be zero."""
        found = {}
        for name, value in self.optimum.items():
            full = torch.autograd.functional.hessian(lambda x, name=name: self.loss({**self.optimum, name: x}), value)
            full = full.reshape(value.numel(), value.numel())
            assert torch.allclose(full, torch.diag(full.diagonal()))
            found[name] = full.diagonal().view(value.shape)
        return found


def test_the_bound_holds_on_a_quadratic_loss_with_exact_hessians() -> None:
    """Theorem 2 without its O(3): the true losses of the merged net against the bound."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> dict[str, Tensor]:
        return {name: torch.randn(s, generator=generator).double() for name, s in NET.items()}

    base, weights = draw(), [0.5, 0.3, 0.2]
    tuned = [{name: base[name] + 0.2 * value for name, value in draw().items()} for _ in weights]
    tasks = [QuadraticTask(state, generator) for state in tuned]
    hessians = [task.hessian() for task in tasks]
    config = EpiMerConfig(rank=3, aggregator="mean")
    merged = merge_state_dicts(base, tuned, "epimer", config, hessians, weights=weights, exact=True)
    true = sum(weight * float(task.loss(merged)) for weight, task in zip(weights, tasks, strict=True))

    sources = [StateDict(str(index), state) for index, state in enumerate(tuned)]
    measured = [StateDict("", values) for values in hessians]
    layers = list(diagnose_layers(Ingredients(StateDict("base", base), sources, weights, measured), [3], exact=True))
    total = rank_totals(layers, 3).curvature
    assert total is not None
    assert total.loss == pytest.approx(true, rel=1e-5)  # bias and cross terms included
    assert true < total.bound < 3 * true  # it holds, and says something
    parts = [layer.at[3].curvature if layer.at else layer.mean for layer in layers]
    assert [part is not None and part.loss <= part.bound * (1 + 1e-12) for part in parts] == [True] * 3
    crossed = [2 * part.loss - part.variance - part.residual for part in parts if part]
    assert all(
        abs(cross) <= 2 * math.sqrt(part.variance * part.residual) for cross, part in zip(crossed, parts) if part
    )
    assert any(abs(cross) > 0.01 * true for cross in crossed)


# --- the words ------------------------------------------------------------------------------------------------------


def totals(
    kept: float = 0.7, *, share: float = 0.1, equal: float = 0.1, inside: float = 2.0, outside: float = 1.0,
    traces: tuple[float, ...] = (1, 1, 1), rank: int = 8, beside: float = 0.0,
) -> RankTotals:  # fmt: skip
    curvature = CurvatureDiagnosis(share, 1, equal, 1, inside, outside, 1, traces)
    return RankTotals(rank, 0, (0.9, kept, 0.9), (0.95, 0.95, 0.95), curvature, (0.12, 0.3), beside)


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ([totals(share=0.004)], "Curvature will hardly matter: at rank 8 eta is 0.4%.*isotropy deviation 0.12"),
        ([totals(equal=0.004)], "only as one weight per task and layer.*10.0%.*0.4% once"),
        ([totals(equal=0.03)], "can matter, mostly as one weight.*10.0%.*3.0% once"),
        ([totals()], "Curvature can matter: at rank 8"),
        ([totals(traces=(1, 8, 1))], "b has 80% of all curvature.*--normalize trace"),
        ([totals(outside=9, rank=4), totals(outside=3)], "R_S 3, V_S of the matrices 2.; R_S falls .*9 at rank 4"),
        ([totals(outside=3.2, rank=4), totals(outside=3)], "rank makes little difference .R_S 3.2 at rank 4"),
        ([totals(outside=9, rank=2), totals(outside=2, rank=4), totals(outside=3)], "rank 4 leaves out least .R_S 2"),
        ([totals(outside=3)], "R_S 3, V_S of the matrices 2.\\.$"),
        ([totals(beside=1.6, outside=2.1, inside=3.0)], "R_S 2.1, V_S of the matrices 1.4"),
        ([totals(0.2, rank=4), totals(0.4), totals(0.6, rank=16)], "Ranks below 16 .* of b .rank 8: 40% of b kept"),
        ([totals(0.2)], "Even rank 8 .* of b .20% of b kept; its own directions alone would keep 95%"),
        ([totals(0.6, rank=4), totals()], "Every rank keeps at least half .*rank 4: 60% of b"),
    ],
)
def test_the_verdict_follows_its_rules(given: list[RankTotals], pattern: str) -> None:
    found = verdict("abc", given, torch.eye(3))
    assert any(re.search(pattern, sentence) for sentence in found), found
    assert len([sentence for sentence in found if "Curvature" in sentence]) == 1
    assert ("of all curvature" in " ".join(found)) == (given[-1].curvature.traces != (1, 1, 1))  # type: ignore[union-attr]
    assert ("R_S" in " ".join(found)) == (given[-1].curvature.residual > 2)  # type: ignore[union-attr]


def test_the_verdict_on_directions() -> None:
    gram = torch.tensor([[1, -0.2, 0], [-0.2, 1, 0.05], [0, 0.05, 1]]).double()
    assert verdict("abc", [totals()], gram)[-1] == "Tasks that point against each other: a and b (cosine -0.20)."
    assert verdict("abc", [totals()], gram.abs())[-1].endswith("(cosines from 0.00 to 0.20).")
    assert "at most one" in verdict("ab", [totals()], torch.diag(torch.tensor([1.0, 0.0])))[-1]


# --- the command ----------------------------------------------------------------------------------------------------


def strict(file: Path) -> dict:  # type: ignore[type-arg]
    return json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_diagnosis_is_complete(tiny_zoo: Path, run: Run) -> None:
    out = tiny_zoo / "out"
    words = [tiny_zoo / name for name in "abc"]
    code, output, complaint = run("diagnose", *words, "--base", tiny_zoo / "base", "--rank", 4, 2, "--out", out)
    assert (code, complaint) == (0, "")
    assert contents(out) == ["cosines.png", "diagnosis.json", "energy.png", "eta.png"]
    report = strict(out / "diagnosis.json")
    for sentence in report["verdict"]:
        assert sentence in output
    assert "rank 4 capped at floor(min(m, n) / T) in 1 layers" in output
    assert report["labels"] == ["a", "b", "c"]
    assert report["note"] is None
    assert len(report["curvature"]["statistics"]) == 3
    assert [entry["rank"] for entry in report["totals"]["ranks"]] == [2, 4]
    assert len(report["layers"]) == len(CLIP.shapes(TINY))
    position = next(layer for layer in report["layers"] if "position" in layer["name"])
    assert [entry["capped_rank"] for entry in position["ranks"]] == [1, 1]
    assert report["totals"]["ranks"][1]["capped_layers"] == 1
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    states = [load_file(tiny_zoo / folder / "model.safetensors")[name] for folder in ("base", *"abc")]
    fisher = [load_file(tiny_zoo / folder / "fisher.safetensors")[name] for folder in "abc"]
    expected = reference.diagnosis([own - states[0] for own in states[1:]], fisher, rank=4)
    found = next(layer for layer in report["layers"] if layer["name"] == name)["ranks"][1]
    assert found["curvature"]["eta"] == pytest.approx(expected["eta"], rel=1e-3)
    assert found["curvature"]["V_S"] == pytest.approx(expected["variance"], rel=1e-3)
    assert found["curvature"]["R_S"] == pytest.approx(expected["residual"], rel=1e-3)
    total = report["totals"]["ranks"][1]["curvature"]
    parts = [own["ranks"][1]["curvature"] if own["ranks"] else own["curvature"] for own in report["layers"]]
    assert total["V_S"] == pytest.approx(sum(part["V_S"] for part in parts))
    beside = sum(own["curvature"]["V_S"] for own in report["layers"] if not own["ranks"])
    assert 0 < beside < total["V_S"]
    assert total["V_S_of_non_matrices"] == pytest.approx(beside)
    assert total["eta"] == pytest.approx(sum(part.get("eta", 0) for part in parts))
    assert total["bound"] == pytest.approx(0.5 * (total["V_S"] ** 0.5 + total["R_S"] ** 0.5) ** 2)
    wholes = [load_file(tiny_zoo / folder / "model.safetensors") for folder in ("base", "a", "c")]
    base, a, c = (torch.cat([state[name].flatten() for name in sorted(state)]) for state in wholes)
    expected_cosine = float(torch.cosine_similarity(a - base, c - base, dim=0))
    assert report["totals"]["cosine"][0][2] == pytest.approx(expected_cosine, abs=1e-5)


def test_eta_is_that_of_the_merge(tiny_zoo: Path, run: Run) -> None:
    words = [tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--rank", 4, "--json", "--out"]
    _, looked, _ = run("diagnose", *words, tiny_zoo / "diagnosis")
    code, merged, complaint = run("merge", *words, tiny_zoo / "merged")
    assert code == 0, complaint
    eta = json.loads(looked)["totals"]["ranks"][0]["curvature"]["eta"]
    assert eta == pytest.approx(json.loads(merged)["totals"]["eta"], rel=1e-5)


def test_json_is_one_object_without_layers(tiny_zoo: Path, run: Run) -> None:
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--weights", 2, 1, "--json"]
    code, output, complaint = run(*words, "--out", tiny_zoo / "out")
    assert (code, complaint) == (0, "")
    assert len(output.splitlines()) == 1
    found = json.loads(output)
    assert found["weights"] == pytest.approx([2 / 3, 1 / 3])
    assert sorted(found["pictures"]) == ["cosines.png", "energy.png", "eta.png"]
    assert "layers" not in found


def test_without_fisher_information_the_rest_is_there(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "b" / "fisher.safetensors").rename(tiny_zoo / "b.safetensors")
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base"]
    code, output, complaint = run(*words, "--out", tiny_zoo / "out")
    assert (code, complaint) == (0, "")
    assert "`hf-epimer fisher" in output
    assert contents(tiny_zoo / "out") == ["cosines.png", "diagnosis.json", "energy.png"]
    report = strict(tiny_zoo / "out" / "diagnosis.json")
    assert report["curvature"] is None
    assert "hf-epimer fisher" in report["note"]
    assert {entry["curvature"] for entry in report["totals"]["ranks"]} == {None}
    assert {entry["curvature"] for layer in report["layers"] for entry in layer["ranks"]} == {None}
    assert all(0 < value <= 1 for value in report["totals"]["ranks"][0]["energy_kept"])
    given = ["--fisher", f"b={tiny_zoo / 'b.safetensors'}"]
    assert run(*words, *given, "--out", tiny_zoo / "two")[0] == 0
    assert strict(tiny_zoo / "two" / "diagnosis.json")["curvature"] is not None
    (tiny_zoo / "a" / "fisher.safetensors").unlink()
    fails(run(*words, *given, "--out", tiny_zoo / "three"), "needs the Fisher information of a")


@pytest.mark.parametrize(
    ("words", "pattern", "code"),
    [
        (["a"], "at least two", 2),
        ([], "give the checkpoints", 2),
        (["a", "b", "--rank", "0"], "--rank must be whole numbers of at least 1, not 0", 2),
        (["a", "b", "--rank", "4", "-3"], "-3", 2),
        (["a", "b", "--rank", "x"], "--rank", 2),
        (["a", "b", "--weights", "1"], "2 models, 1 weights", 2),
        (["a", "b", "--fisher", "z=a"], "no model is labelled z", 2),
        (["a", "b", "--alpha", "1"], "--alpha", 2),
        (["a", "nowhere/at/all"], "does not exist", 1),
        (["a", "b", "--out", "b"], "b holds|not empty", 1),
        (["a", "b", "--out", "base", "--overwrite"], "would be lost", 1),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_is_written(
    words: list[str], pattern: str, code: int, tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_zoo)
    before = contents(tiny_zoo)
    fails(run("diagnose", *words, "--base", "base"), pattern, code)
    assert contents(tiny_zoo) == before


def test_task_files_are_taken(clip_zoo: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    words = ["diagnose", *(f"{name}={clip_zoo / name}" for name in "ab"), "--base", clip_zoo / "base"]
    files = ["--task", clip_zoo / "a.json", "--task", clip_zoo / "b.json"]
    code, _, complaint = run(*words, *files, "--samples", 8, "--rank", 2, "--out", tmp_path / "out")
    assert (code, complaint) == (0, "")
    assert strict(tmp_path / "out" / "diagnosis.json")["curvature"] is not None


def test_another_architecture_or_damage_leaves_nothing_behind(tiny_zoo: Path, run: Run) -> None:
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", tiny_zoo / "out"]
    before = contents(tiny_zoo)
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    rewrite(tiny_zoo / "b", lambda s: s[name].view(-1)[7].fill_(float("nan")))
    fails(run(*words), rf"b: NaN or Inf in {name}")
    config = json.loads((tiny_zoo / "b" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tiny_zoo / "b" / "config.json").write_text(json.dumps(config))
    fails(run(*words), r"b is another architecture than the base base \(num_hidden_layers: 2 \| 3\)")
    assert contents(tiny_zoo) == before


@pytest.mark.parametrize("kept", ["", "bias", "mlp.fc1.weight"])
def test_partly_tuned_checkpoints(kept: str, tiny_zoo: Path, run: Run) -> None:
    """a changed only its last norm, biases or one kind of matrix; whatever is undefined then is null, not an error."""
    base = load_file(tiny_zoo / "base" / "model.safetensors")
    same = [name for name in base if not (kept and name.endswith(kept)) and not name.startswith("vision_model.post")]
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--rank", 4, 8]
    rewrite(tiny_zoo / "a", lambda s: s.update({name: base[name] for name in same}))
    code, _, complaint = run(*words, "--out", tiny_zoo / "one")
    assert (code, complaint) == (0, "")
    report = strict(tiny_zoo / "one" / "diagnosis.json")
    assert (report["totals"]["ranks"][0]["energy_kept"][0] is None) == (kept != "mlp.fc1.weight")
    assert report["layers"][2]["cosine"][0] == [None, None]
    rewrite(tiny_zoo / "b", lambda s: s.update({name: base[name] for name in same}))
    code, output, complaint = run(*words, "--out", tiny_zoo / "both")
    assert (code, complaint) == (0, "")
    assert ("Curvature has nothing to act on" in output) == (kept != "mlp.fc1.weight")
    assert ("eta.png" in contents(tiny_zoo / "both")) == (kept == "mlp.fc1.weight")
    assert strict(tiny_zoo / "both" / "diagnosis.json")["totals"]["ranks"][0]["curvature"]["V_S"] > 0


def test_from_python_and_twice(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_epimer.errors import OutputError

    monkeypatch.chdir(tiny_zoo)
    (tiny_zoo / "merged-epimer").mkdir()
    (tiny_zoo / "merged-epimer" / "earlier").write_text("a merge that is not looked at")
    recipe = MergeRecipe(tuple(map(ModelRef.parse, "ab")), ModelRef.parse("base"), method="ties", push_to="org/merged")
    stages: list[tuple[str, int]] = []
    found = diagnose(recipe, (3,), progress=lambda stage, done, total: stages.append((stage, done)))
    assert sum(done for stage, done in stages if stage == "diagnosing") == len(found.layers)
    assert found.out == Path("diagnosis")
    assert found.pictures == ("cosines.png", "energy.png", "eta.png")
    assert found.totals[0].curvature is not None
    with pytest.raises(OutputError, match="not empty"):
        diagnose(recipe)


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_epimer import MergeRecipe, ModelRef, diagnose\n"
        "from hf_epimer.pipeline.merge import _memory\n"
        "folder = Path(sys.argv[1]); peak = 0\n"
        "def look(stage, done, total):\n"
        "    global peak; peak = max(peak, _memory('RssAnon'))\n"
        "models = tuple(ModelRef.parse(str(folder / name)) for name in 'ab')\n"
        "diagnose(MergeRecipe(models, ModelRef.parse(str(folder / 'base'))), (4, 16), str(folder / 'out'), look)\n"
        "print(peak)"
    )
    peaks = []
    for depth in (4, 24):
        tower = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": depth}
        generator = torch.Generator().manual_seed(0)
        base = {name: torch.randn(shape, generator=generator) for name, shape in CLIP.shapes(tower).items()}
        folder = tmp_path / str(depth)
        write_checkpoint(folder / "base", base, config=tower)
        for name in "ab":
            tuned = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
            write_checkpoint(folder / name, tuned, config=tower, fisher={n: v.square() for n, v in base.items()})
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[0] > 0
    assert peaks[1] - peaks[0] < 30e6


# --- the pictures ---------------------------------------------------------------------------------------------------


def test_the_pictures_show_something(tiny_zoo: Path, run: Run) -> None:
    from PIL import Image

    words = [tiny_zoo / name for name in "abc"]
    assert run("diagnose", *words, "--base", tiny_zoo / "base", "--out", tiny_zoo / "out")[0] == 0
    for file in (tiny_zoo / "out").glob("*.png"):
        with Image.open(file) as image:
            image.load()
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert min(image.size) > 400
            colours = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
        assert colours is not None
        assert len(colours) > 50
        assert max(count for count, _ in colours) < 0.97 * image.width * image.height


def test_titles_say_the_finding() -> None:
    energy = plots.energy_by_rank(["a", "b"], [4, 8], [[0.2, 0.3], [0.6, 0.4]], [[0.3, 0.4], [0.7, 0.9]])
    assert energy.axes[0].get_title() == (
        "At rank 8 the shared basis keeps 40% of b, the least of all tasks;\nits own directions alone would keep 90%"
    )
    lines = [line for line in energy.axes[0].lines if line.get_label() == "b"]
    assert lines[0].get_ydata().tolist() == [30, 40]  # type: ignore[union-attr]
    against = plots.cosine_matrix(["a", "b", "c"], [[1, -0.3, 0.1], [-0.3, 1, 0], [0.1, 0, 1]])
    assert "a and b point most\nagainst each other (cosine -0.30)" in against.axes[0].get_title()
    values = {"m.layers.3.fc1.weight": (1.0, 4.0), "m.layers.3.fc2.weight": (2.0, 2.0), "m.position.weight": (0.0, 4.0)}
    eta = plots.eta_by_layer(values, values, 8)
    assert eta.get_suptitle() == (
        "Rank 8: curvature can save 30.0% of the loss of plain averaging,\nthe largest part (67% of it) in fc2"
    )
    assert eta.axes[0].get_ylim()[1] > 1.5
    assert [tick.get_text() for tick in eta.axes[1].get_xticklabels()] == ["embed", "3"]
    assert [text.get_text() for text in eta.axes[0].texts] == ["0.0%", "50.0%"]
    assert sorted(bar.get_height() for bar in eta.axes[0].patches if bar.get_height()) == [0.5, 1.0]


def test_without_matplotlib_the_report_is_there_and_the_error_says_what_to_install(
    tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", tiny_zoo / "out"]
    code, output, complaint = run(*words)
    assert code == 1
    assert complaint.startswith("error: the pictures need matplotlib: pip install 'hf-epimer[plots]'")
    assert str(tiny_zoo / "out" / "diagnosis.json") in complaint
    assert contents(tiny_zoo / "out") == ["diagnosis.json"]
    assert "Curvature" in output


def test_the_package_does_without_matplotlib_until_it_draws() -> None:
    code = "import sys, hf_epimer.analysis.diagnosis, hf_epimer.analysis.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
