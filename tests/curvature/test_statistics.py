"""Per-sample gradients, what is accumulated from them, and the pass, each against plain autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel

from helpers.checkpoints import TINY
from helpers.clip import inside
from hf_epimer import estimate_fisher
from hf_epimer.curvature import accumulators
from hf_epimer.curvature.accumulators import (
    FisherDiagonal,
    GradientGram,
    KroneckerFactors,
    ProjectedFisher,
    SquaredMean,
)
from hf_epimer.curvature.data_pass import Subject, accumulate, probe_determinism
from hf_epimer.curvature.hessian import projected_hessian
from hf_epimer.curvature.per_sample import Outer, per_sample_gradients
from hf_epimer.errors import DataError, StatisticsError, UsageError
from hf_epimer.models.classifier import Classifier, ZeroShotHead
from hf_epimer.models.clip import CLIP
from hf_epimer.numerics.subspace import TaggedBasis, tagged_basis
from hf_epimer.tasks.images import Batch

Batches = list[tuple[Tensor, Tensor]]


FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


POSITIONS = "vision_model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def model() -> Classifier:
    """A float64 classifier with five classes whose every parameter matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = CLIPVisionModel(CLIPVisionConfig(**TINY))
        for parameter in vision.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        head = ZeroShotHead(torch.randn(24, 32), torch.randn(5, 24), torch.tensor(2.0))
        return Classifier(vision, CLIP, head, None).eval().double()


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 3, 16, 16, generator=generator).double(), torch.tensor([0, 4, 2, 2, 1, 3, 0])


def batched(samples: tuple[Tensor, Tensor], *sizes: int) -> Batches:
    return list(zip(samples[0].split(list(sizes)), samples[1].split(list(sizes)), strict=True))


def per_sample(model: nn.Module, names: dict[str, str], samples: tuple[Tensor, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The definition: one backward pass per sample, through autograd's own gradients."""
    parameters = [model.get_parameter(own) for own in names]
    for pixels, label in zip(*samples, strict=True):
        loss = cross_entropy(model(pixels.unsqueeze(0)), label.unsqueeze(0))
        yield dict(zip(names.values(), torch.autograd.grad(loss, parameters), strict=True))


def squares(model: nn.Module, names: dict[str, str], samples: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    gradients = list(per_sample(model, names, samples))
    return {name: torch.stack([g[name].square() for g in gradients]).mean(0) for name in gradients[0]}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Softmax ignores a shift common to all keys, so the gradient of a key's bias is nothing but rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("k_proj.bias"):
            assert float(found[name].max()) < 1e-12
        else:
            assert float((found[name] - value).norm() / value.norm()) < tolerance, name
            assert found[name].shape == value.shape


def test_every_parameter_of_the_tower_has_its_per_sample_squares(
    model: Classifier, samples: tuple[Tensor, Tensor]
) -> None:
    found = estimate_fisher(model, batched(samples, 7))
    assert found.keys() == CLIP.shapes(TINY).keys()
    assert_equal(found, squares(model, model.tower_names(), samples))


def test_the_batch_size_does_not_matter(model: Classifier, samples: tuple[Tensor, Tensor]) -> None:
    one = estimate_fisher(model, batched(samples, 7))
    for sizes in ((1,) * 7, (3, 4), (6, 1)):
        assert_equal(estimate_fisher(model, batched(samples, *sizes)), one)
        drawn = [estimate_fisher(model, batched(samples, *s), labels="sampled", seed=3) for s in (sizes, (7,))]
        assert_equal(drawn[0], drawn[1])


def test_parameters_are_left_as_they_were(model: Classifier, samples: tuple[Tensor, Tensor]) -> None:
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_fisher(model, batched(samples, 7))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_sampled_labels_give_the_true_fisher_in_expectation(model: Classifier, samples: tuple[Tensor, Tensor]) -> None:
    """E over y ~ p(y|x) of the squares, exactly, against many draws."""
    expected: dict[str, Tensor] = {}
    probabilities = model(samples[0]).softmax(-1).detach()
    for index, pixels in enumerate(samples[0]):
        for label in range(5):
            one = next(per_sample(model, model.tower_names(), (pixels.unsqueeze(0), torch.tensor([label]))))
            share = probabilities[index, label] / len(samples[0])
            expected = {n: expected.get(n, 0) + share * g.square() for n, g in one.items()}
    repeats = 120
    many = (samples[0].repeat(repeats, 1, 1, 1), samples[1].repeat(repeats))
    found = estimate_fisher(model, batched(many, len(many[1])), labels="sampled", seed=1, probe=False)
    error = float((found[FC1] - expected[FC1]).norm() / expected[FC1].norm())
    true_labels = estimate_fisher(model, batched(samples, 7))
    assert error < 0.2
    assert float((true_labels[FC1] - expected[FC1]).norm() / expected[FC1].norm()) > 2 * error
    assert not torch.equal(
        estimate_fisher(model, batched(samples, 7), labels="sampled", seed=5)[FC1],
        estimate_fisher(model, batched(samples, 7), labels="sampled", seed=6)[FC1],
    )


def test_the_squared_mean_is_the_square_of_the_mean(model: Classifier, samples: tuple[Tensor, Tensor]) -> None:
    subject = Subject(model, model.tower_names())
    gradients = list(per_sample(model, model.tower_names(), samples))
    expected = {name: torch.stack([g[name] for g in gradients]).mean(0).square() for name in gradients[0]}
    found, count = accumulate(subject, numbered(samples), SquaredMean(subject.shapes))
    assert count == 7
    assert_equal(found, expected)


def numbered(samples: tuple[Tensor, Tensor], *sizes: int) -> list[Batch]:
    start, batches = 0, []
    for inputs, labels in batched(samples, *(sizes or (len(samples[1]),))):
        batches.append(Batch(inputs, labels, range(start, start + len(labels))))
        start += len(labels)
    return batches


def test_kronecker_factors_are_the_second_moments(model: Classifier, samples: tuple[Tensor, Tensor]) -> None:
    """From the layer's own input and output gradient, caught by plain hooks, one sample at a time."""
    subject = Subject(model, model.tower_names())
    found, _ = accumulate(subject, numbered(samples, 2, 2, 3), KroneckerFactors(subject.shapes))
    layer = inside(model.tower).get_submodule("encoder.layers.0.mlp.fc1")
    caught: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, i, o: caught.update(x=i[0])),
        layer.register_full_backward_hook(lambda m, i, o: caught.update(g=o[0])),
    ]
    inputs, outputs, positions = [], [], []
    for pixels, label in zip(*samples, strict=True):
        cross_entropy(model(pixels.unsqueeze(0)), label.unsqueeze(0)).backward()
        x, g = caught["x"][0], caught["g"][0]
        inputs.append(x.mT @ x / len(x))
        outputs.append(g.mT @ g)
        positions.append(g.square().sum(1))
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    assert torch.allclose(found[f"{FC1}.input_factor"], torch.stack(inputs).mean(0))
    assert torch.allclose(found[f"{FC1}.output_factor"], torch.stack(outputs).mean(0))
    assert torch.allclose(found[f"{FC1}.positions"], torch.stack(positions).mean(0))
    matrices = [name for name, shape in CLIP.shapes(TINY).items() if len(shape) == 2]
    assert {name.rsplit(".", 1)[0] for name in found} == set(matrices)


@pytest.mark.parametrize("across_positions", [False, True])
def test_gradient_grams_are_parts_of_the_per_sample_fisher(
    across_positions: bool, model: Classifier, samples: tuple[Tensor, Tensor]
) -> None:
    """sum_n G_n^T G_n with autograd's own gradients of the weight; without products of different positions, the same
    with every position's share of the gradient by itself."""
    subject = Subject(model, model.tower_names())
    grams = [GradientGram(subject.shapes, across_positions=across_positions) for _ in range(2)]
    found, again = (
        accumulate(subject, numbered(samples, *sizes), gram)[0]
        for sizes, gram in zip(((3, 4), (7,)), grams, strict=True)
    )
    assert_equal(found, again)  # unchanged by batch size
    matrices = [name for name, shape in CLIP.shapes(TINY).items() if len(shape) == 2]
    assert found.keys() == {f"{name}{part}" for name in matrices for part in (".gradient_gram", ".positions")}
    for name in matrices:  # the weights of the positions are those of the sum
        assert float(found[f"{name}.positions"].sum()) > 0
    layer = inside(model.tower).get_submodule("encoder.layers.0.mlp.fc1")
    caught: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, i, o: caught.update(x=i[0])),
        layer.register_full_backward_hook(lambda m, i, o: caught.update(g=o[0])),
    ]
    expected = torch.zeros(1, dtype=torch.float64)
    for gradients in per_sample(model, model.tower_names(), samples):
        whole = gradients[FC1]
        x, g = caught["x"][0].detach(), caught["g"][0]
        shares = [torch.outer(*pair) for pair in zip(g, x, strict=True)]  # of the gradient, position by position
        torch.testing.assert_close(torch.stack(shares).sum(0), whole)
        expected = expected + sum(share.mT @ share for share in ([whole] if across_positions else shares)) / 7
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found[f"{FC1}.gradient_gram"], expected)
    assert all(torch.equal(gram, gram.mT) for name, gram in found.items() if name.endswith("gram"))


def test_a_gradient_gram_of_one_position_is_the_fisher_of_every_row() -> None:
    """One sample at one position: |g|^2 x x^T, and both forms are the same."""
    layer = nn.Linear(5, 3, bias=False).double()
    pixels, label = torch.randn(1, 5).double(), torch.tensor([2])
    subject = Subject(layer, {"weight": "w"})
    batch = [Batch(pixels, label, range(1))]
    forms = [
        accumulate(subject, batch, GradientGram(subject.shapes, across_positions=across))[0]["w.gradient_gram"]
        for across in (False, True)
    ]
    g = layer(pixels).softmax(-1).detach()[0] - torch.eye(3, dtype=torch.float64)[2]
    expected = g.square().sum() * torch.outer(pixels[0], pixels[0])
    for form in forms:
        torch.testing.assert_close(form, expected)


def test_symmetric_sums_do_not_depend_on_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(4, 6, 11, generator=generator).double(), torch.randn(4, 6, 5, generator=generator).double()
    found = []
    for strips in (1, 3, 8, 20):
        monkeypatch.setattr(accumulators, "STRIPS", strips)
        gram = GradientGram({"w": torch.Size((5, 11))})
        for part in (slice(0, 3), slice(3, 4)):
            gram.add("w", Outer(g[part], x[part]))
        found.append(gram.finish(gram.sums, 4)["w.gradient_gram"])
    expected = torch.einsum("nt,ntx,nty->xy", g.square().sum(2), x, x) / 4
    for value in found:
        torch.testing.assert_close(value, expected)


def test_positions_of_which_nothing_is_heard_are_left_out_and_nan_is_not() -> None:
    g, x = torch.zeros(2, 4, 3), torch.randn(2, 4, 5)
    g[0, 1, 2] = g[1, 3, 0] = 1.0
    heard = Outer(g, x).heard()
    assert heard.left.shape == (2, 2, 3) and torch.equal(heard.right, x[:, [1, 3]])
    assert Outer(g[:, [1, 3]], x[:, [1, 3]]).heard().right.shape == (2, 2, 5)
    assert Outer(0 * g, x).heard().left.shape == (2, 0, 3)
    gram = GradientGram({"w": torch.Size((3, 5))})
    gram.add("w", Outer(0 * g, x))
    assert not gram.finish(gram.sums, 2)["w.gradient_gram"].any()
    g[0, 2, 1] = torch.nan
    gram.add("w", Outer(g, x))
    assert bool(gram.finish(gram.sums, 2)["w.gradient_gram"].isnan().any())


def bases_of(names: list[str], rank: int = 3) -> dict[str, TaggedBasis]:
    generator = torch.Generator().manual_seed(2)
    shapes = CLIP.shapes(TINY)
    found = {}
    for name in names:
        basis = tagged_basis(torch.randn(2, *shapes[name], generator=generator, dtype=torch.float64), rank, exact=True)
        assert basis is not None
        found[name] = basis
    return found


def test_the_projected_fisher_is_the_projection_of_the_per_sample_fisher(
    model: Classifier, samples: tuple[Tensor, Tensor]
) -> None:
    bases = bases_of([FC1, POSITIONS], rank=2)
    subject = Subject(model, model.tower_names())
    found, _ = accumulate(subject, numbered(samples, 3, 4), ProjectedFisher(bases))
    gradients = list(per_sample(model, model.tower_names(), samples))
    for name, basis in bases.items():
        z = torch.stack([basis.project(g[name]) for g in gradients])
        expected = z.mT @ z / len(z)
        assert torch.allclose(found[name], expected, rtol=1e-10)
        identity = expected.diagonal().mean() * torch.eye(basis.size, dtype=z.dtype)
        noise = sum(float((torch.outer(one, one) - expected).square().sum()) for one in z) / len(z) ** 2
        share = min(1.0, noise / float((expected - identity).square().sum()))
        assert float(found[f"{name}.shrinkage"]) == pytest.approx(share, rel=1e-8)


def test_the_projected_hessian_agrees_with_finite_differences(
    model: Classifier, samples: tuple[Tensor, Tensor]
) -> None:
    bases = bases_of([FC1], rank=1)
    basis = bases[FC1]
    found = projected_hessian(Subject(model, model.tower_names()), numbered(samples, 3, 4), bases)[FC1]
    weight = model.get_parameter(next(own for own, name in model.tower_names().items() if name == FC1))
    original = weight.detach().clone()

    def loss(x: Tensor) -> float:
        with torch.no_grad():
            weight.copy_(original + basis.expand(x))
            value = float(cross_entropy(model(samples[0]), samples[1]))
            weight.copy_(original)
        return value

    step = 1e-3
    unit = step * torch.eye(basis.size, dtype=torch.float64)
    for i in range(basis.size):
        for j in range(basis.size):
            corners = loss(unit[i] + unit[j]) - loss(unit[i]) - loss(unit[j]) + loss(0 * unit[i])
            assert float(found[i, j]) == pytest.approx(corners / step**2, rel=2e-2, abs=1e-4)


class Odd(nn.Module):
    """Layers that CLIP does not have, or uses otherwise: one called twice, a strided convolution, a checkpoint."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1, dilation=1)
        self.twice = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 5)
        self.reentrant = reentrant

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.convolution(pixels).flatten(2).mT
        tokens = self.twice(torch.tanh(self.twice(tokens)))
        if self.reentrant is None:
            body = self.norm(tokens)
        else:
            body = checkpoint(self.norm, tokens, use_reentrant=self.reentrant)
        return self.out(body.square().mean(1))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_reused_strided_and_checkpointed_layers(reentrant: bool | None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        odd = Odd(reentrant).double()
        samples = (torch.randn(6, 3, 8, 9).double(), torch.randint(0, 5, (6,)))
    names = {name: name for name, _ in odd.named_parameters()}
    found = estimate_fisher(odd, batched(samples, 4, 2))
    odd.reentrant = None  # autograd.grad, of which the definition is made, refuses reentrant checkpoints
    assert_equal(found, squares(odd, names, samples))


def test_what_cannot_be_measured_is_refused() -> None:
    data = [(torch.randn(2, 4), torch.tensor([0, 1]))]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(StatisticsError, match=r"1\.weight and 0\.weight share"):
        estimate_fisher(tied, data)
    with pytest.raises(StatisticsError, match="BatchNorm1d are not known"):
        estimate_fisher(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), data)
    unused = nn.Linear(4, 4)
    unused.register_module("idle", nn.Linear(2, 2))
    with pytest.raises(StatisticsError, match=r"does not depend on idle\.bias \(2 such"):
        estimate_fisher(unused, data)
    with pytest.raises(StatisticsError, match="no samples"):
        estimate_fisher(nn.Linear(4, 4), [])
    with pytest.raises(DataError, match="label 7 is outside the 4 classes"):
        estimate_fisher(nn.Linear(4, 4), [(torch.randn(1, 4), torch.tensor([7]))])
    with pytest.raises(DataError, match="label -1"):
        estimate_fisher(nn.Linear(4, 4), [(torch.randn(1, 4), torch.tensor([-1]))])
    with pytest.raises(UsageError, match="read only once"):
        estimate_fisher(nn.Linear(4, 4), iter(data))
    damaged = nn.Linear(4, 4)
    damaged.weight.data[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match="not finite"):
        estimate_fisher(damaged, data, probe=False)


def test_the_probe_finds_dropout_and_augmentation() -> None:
    class Restless:
        """Another image each time it is read."""

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield torch.randn(2, 4), torch.tensor([0, 1])

    with pytest.raises(StatisticsError, match=r"in the images \(is an augmentation on\?\)"):
        estimate_fisher(nn.Linear(4, 4), Restless())
    assert estimate_fisher(nn.Linear(4, 4), Restless(), probe=False)

    class Dropping(nn.Module):
        """Dropout that does not ask whether it is training."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(nn.functional.dropout(x, 0.5, training=True))

    data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(StatisticsError, match=r"in the loss \(is dropout on\?\)"):
        estimate_fisher(Dropping(), data)
    model = Dropping()
    probe_determinism(Subject(nn.Linear(4, 4), {"weight": "w"}), [Batch(*data[0], range(8))])
    assert not any(module._forward_hooks for module in model.modules())


def test_half_precision_is_for_the_passes_only(model: Classifier, samples: tuple[Tensor, Tensor]) -> None:
    single = copy.deepcopy(model).float()
    subject = Subject(single, single.tower_names())
    batch = [Batch(samples[0].float(), samples[1], range(7))]
    full, _ = accumulate(subject, batch, FisherDiagonal(subject.shapes))
    half, _ = accumulate(subject, batch, FisherDiagonal(subject.shapes), precision="bf16")
    assert all(value.dtype == torch.float32 for value in half.values())
    change = float((half[FC1] - full[FC1]).norm() / full[FC1].norm())
    assert 1e-4 < change < 0.1


def test_no_copy_of_the_model_per_sample_is_held() -> None:
    """What a consumer sees of a large layer is two thin factors; their product exists for one sample at a time."""
    layer = nn.Linear(300, 200, bias=False)
    seen: list[Any] = []
    with per_sample_gradients(layer, {"weight": "weight"}, lambda name, gradient: seen.append(gradient)) as forward:
        forward(16, torch.randn(16, 300)).sum().backward()
    (gradient,) = seen
    assert isinstance(gradient, Outer)
    assert gradient.left.numel() + gradient.right.numel() == 16 * 500
    assert len({one.data_ptr() for one in gradient.per_sample()}) == 1


def test_accumulators_of_several_processes_add_up(model: Classifier, samples: tuple[Tensor, Tensor]) -> None:
    subject = Subject(model, model.tower_names())
    whole, _ = accumulate(subject, numbered(samples), FisherDiagonal(subject.shapes))
    parts = [FisherDiagonal(subject.shapes) for _ in range(2)]
    for part, accumulator in zip(batched(samples, 3, 4), parts, strict=True):
        accumulate(subject, [Batch(*part, range(len(part[1])))], accumulator)
    # what they have summed up has become their mean, in the same memory
    sums = {name: 3 * parts[0].sums[name] + 4 * parts[1].sums[name] for name in whole}
    assert_equal(parts[0].finish(sums, 7), whole)
