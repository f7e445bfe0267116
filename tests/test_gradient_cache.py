"""Gradient caching: the gradients of the whole minibatch from pieces, what BatchNorm sees, and training and resuming with it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from forked import start_ranks

from cellfast.augment import TwoViews
from cellfast.losses import NTXentLoss
from cellfast.models import ModelConfig, build_model
from cellfast.training.gradient_cache import ViewPieces
from cellfast.training.losses_seen import LossReader
from cellfast.training.optimizers import build_optimizer
from cellfast.training.step import TrainingStep, TwoViewModel

SIZE, OUT, CELLS = 24, 16, 22


def minibatch(cells: int = CELLS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 4096, (cells, 3, SIZE, SIZE), generator=generator, dtype=torch.int32).to(torch.uint16)
    return crops, torch.zeros(3), torch.full((3,), 4095.0)


def make_step(encoder: str, *, chunk_size: int | None, amp: bool = False, per_view: bool = False, frozen: bool = False, **values):
    model = build_model(ModelConfig(encoder=encoder, projection_dim=8), seed=0).train()
    if frozen:
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eval()
    optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=1e-4)
    module = TwoViewModel(model, per_view)
    return TrainingStep(module, NTXentLoss(0.1), optimizer, device=torch.device("cpu"), amp=amp, chunk_size=chunk_size, **values)


def gradients(step: TrainingStep, seed: int = 5) -> tuple[float, dict[str, torch.Tensor]]:
    two_views = TwoViews("perakis2021", 3, SIZE, OUT, memory_format=torch.channels_last)
    loss = step.compute_loss(step.views(two_views, *minibatch(), seed=seed))
    step._backward(loss)
    return float(loss.detach()), {name: p.grad.clone() for name, p in step.module.named_parameters()}


@pytest.mark.parametrize("chunk_size", [1, 5, 11, 22, 100])
def test_pieces_have_the_views_of_the_whole(chunk_size):
    for preset in ("default", "perakis2021"):
        two_views = TwoViews(preset, 3, SIZE, OUT)
        crops, low, high = minibatch()
        whole = two_views(crops, low, high, seed=3).unflatten(0, (2, -1))
        pieces = ViewPieces(two_views, crops, low, high, seed=3, chunk_size=chunk_size)
        sizes = [cells.stop - cells.start for cells in pieces.cells]
        assert sum(sizes) == CELLS
        assert max(sizes) <= chunk_size
        assert max(sizes) - min(sizes) <= 1
        per_cell = ViewPieces(two_views, crops, low.expand(CELLS, 3), high.expand(CELLS, 3), seed=3, chunk_size=chunk_size)
        for number, cells in enumerate(pieces.cells):
            for made in (pieces[number], pieces[number], per_cell[number]):
                assert torch.equal(made, whole[:, cells].flatten(0, 1))


@pytest.mark.parametrize(("encoder", "frozen"), [("cnn4", False), ("resnet18", True)])
@pytest.mark.parametrize("chunk_size", [4, 11])
def test_gradients_are_those_of_the_undivided_minibatch(encoder, frozen, chunk_size):
    """An encoder without BatchNorm, and one whose BatchNorm is frozen; in float64 truth would be equal, in float32 to rounding."""
    plain_loss, plain = gradients(make_step(encoder, chunk_size=None, frozen=frozen))
    loss, cached = gradients(make_step(encoder, chunk_size=chunk_size, frozen=frozen))
    assert loss == pytest.approx(plain_loss, abs=1e-5)
    assert plain.keys() == cached.keys()
    for name, gradient in plain.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            cached[name], gradient, atol=2e-4 * scale + 1e-7, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_one_piece_is_the_plain_step_exactly_and_dividing_the_loss_is_not():
    plain_loss, plain = gradients(make_step("resnet18", chunk_size=None))
    loss, cached = gradients(make_step("resnet18", chunk_size=CELLS))
    assert loss == plain_loss
    for name, gradient in plain.items():
        assert torch.equal(cached[name], gradient), name
    # What caching is for: a loss per piece has fewer negatives, and other gradients.
    step = make_step("cnn4", chunk_size=None)
    two_views = TwoViews("perakis2021", 3, SIZE, OUT, memory_format=torch.channels_last)
    pieces = ViewPieces(two_views, *minibatch(), seed=5, chunk_size=11)
    sum(step.compute_loss(pieces[number]) / 2 for number in range(2)).backward()
    divided = {name: p.grad for name, p in step.module.named_parameters()}
    _, whole = gradients(make_step("cnn4", chunk_size=11))
    assert any(not torch.allclose(divided[name], whole[name], rtol=0.05, atol=1e-4) for name in whole)


@pytest.mark.parametrize("per_view", [False, True])
def test_batch_norm_moves_once_per_piece_and_both_passes_see_the_same_statistics(per_view):
    step = make_step("resnet18", chunk_size=11, per_view=per_view)
    reference = copy.deepcopy(step.module)
    gradients(step)
    two_views = TwoViews("perakis2021", 3, SIZE, OUT, memory_format=torch.channels_last)
    pieces = ViewPieces(two_views, *minibatch(), seed=5, chunk_size=11)
    with torch.no_grad():
        for number in range(len(pieces)):
            reference(pieces[number])
    for (name, mine), (_, expected) in zip(step.module.named_buffers(), reference.named_buffers()):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    counts = {int(b) for name, b in step.module.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {len(pieces) * (2 if per_view else 1)}
    assert all(layer.track_running_stats for layer in step.module.modules() if isinstance(layer, torch.nn.BatchNorm2d))


def test_bfloat16_gives_the_same_gradients_in_pieces():
    plain_loss, plain = gradients(make_step("cnn4", chunk_size=None, amp=True))
    loss, cached = gradients(make_step("cnn4", chunk_size=6, amp=True))
    assert loss == pytest.approx(plain_loss, abs=2e-3)
    for name, gradient in plain.items():
        # bfloat16 sums in another order: compared as directions.
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), cached[name].flatten(), dim=0)
        assert cosine > 0.995, name


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        _gradients_of_a_half(rank, folder)
    finally:
        # What averages gradients must be gone before the group: it would drop its last exchange while Python ends, which aborts.
        gc.collect()
        dist.destroy_process_group()


def _gradients_of_a_half(rank: int, folder: str) -> None:
    step = make_step("cnn4", chunk_size=4)
    step.module = torch.nn.parallel.DistributedDataParallel(step.module, gradient_as_bucket_view=True, broadcast_buffers=False)
    step = TrainingStep(step.module, step.loss, step.optimizer, device=step.device, chunk_size=4)
    crops, low, high = minibatch()
    two_views = TwoViews("none", 3, SIZE, OUT, memory_format=torch.channels_last)
    half = slice(rank * CELLS // 2, (rank + 1) * CELLS // 2)
    for _ in range(2):  # a second step starts from clean gradients
        loss = step.compute_loss(step.views(two_views, crops[half], low, high, seed=0))
        step._backward(loss)
    if rank == 0:
        gradient = {name.removeprefix("module."): p.grad for name, p in step.module.named_parameters()}
        torch.save({"loss": float(loss.detach()), "gradient": gradient}, f"{folder}/found.pt")


def test_two_processes_give_the_gradients_of_one(tmp_path):
    start_ranks(_rank, str(tmp_path))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    step = make_step("cnn4", chunk_size=None)
    two_views = TwoViews("none", 3, SIZE, OUT, memory_format=torch.channels_last)
    loss = step.compute_loss(step.views(two_views, *minibatch(), seed=0))
    step._backward(loss)
    assert found["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    for name, parameter in step.module.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found["gradient"][name], parameter.grad, atol=1e-4 * scale + 1e-7, rtol=1e-3)


def test_losses_come_back_at_once_on_a_cpu():
    reader = LossReader(torch.device("cpu"))
    assert reader.put(7, torch.tensor(1.5)) == [(7, 1.5)]
    assert reader.drain() == []


@pytest.mark.cuda
def test_losses_come_back_late_and_in_order_on_a_gpu():
    reader = LossReader(torch.device("cuda"), delay=3)
    seen = []
    for step in range(10):
        due = reader.put(step, torch.tensor(float(step), device="cuda") * 2)
        assert [s for s, _ in due] == ([step - 3] if step >= 3 else [])
        seen += due
    assert seen + reader.drain() == [(step, 2.0 * step) for step in range(10)]


@pytest.mark.cuda
def test_a_recorded_step_trains_as_the_plain_one(monkeypatch):
    """Plain SGD and float32: Adam's first steps are the gradients' signs, which rounding turns where a gradient is near 0."""
    from cellfast.training.cuda_graph import GraphedStep

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    weights = []
    for kind in (TrainingStep, GraphedStep):
        model = build_model(ModelConfig(encoder="resnet18", projection_dim=8), seed=0).cuda().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        device = torch.device("cuda")
        step = kind(TwoViewModel(model, False), NTXentLoss(0.1).cuda(), optimizer, device=device, amp=False)
        two_views = TwoViews("default", 3, SIZE, OUT, memory_format=torch.channels_last)
        crops, low, high = minibatch()
        for seed in range(3):
            step.update(step.compute_loss(step.views(two_views, crops.cuda(), low, high, seed=seed)))
        weights.append({name: value.cpu() for name, value in model.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-3, rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}")
