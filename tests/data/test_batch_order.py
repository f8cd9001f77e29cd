import itertools

import pytest
import torch

from ddim_pl.data.base import BatchOrder, Draw, DrawnImages, EachOnce, TensorImages, shared_batches


def first(order: BatchOrder, count: int) -> list[Draw]:
    return [order.batch(number) for number in range(count)]


@pytest.mark.parametrize(("num_items", "batch_size"), [(40, 4), (43, 4), (3, 8), (8, 8)])
def test_batch_depends_on_its_number_only(num_items: int, batch_size: int) -> None:
    whole = first(BatchOrder(num_items, batch_size, flip=True), 30)
    for start in (0, 7, 10, 23):
        late = BatchOrder(
            num_items, batch_size, flip=True, steps_per_epoch=7, position=lambda at=start: at
        )
        for expected, seen in zip(whole[start : start + 7], late, strict=True):
            torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("num_items", [48, 50, 5])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_batch_of_a_single_process(num_items: int, world_size: int) -> None:
    single = BatchOrder(num_items, 12, seed=3, flip=True)
    ranks = [
        BatchOrder(
            num_items, 12 // world_size, seed=3, flip=True, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert {len(order) for order in ranks} == {len(single)}
    for number in range(9):
        whole = single.batch(number)
        parts = [order.batch(number) for order in ranks]
        for field in (0, 1):
            interleaved = torch.stack([part[field] for part in parts], 1).flatten()
            torch.testing.assert_close(interleaved, whole[field])


def test_every_index_comes_at_most_once_in_a_pass_and_the_rest_is_dropped() -> None:
    order = BatchOrder(43, 4)
    assert len(order) == 10
    for pass_number in range(3):
        draws = [order.batch(10 * pass_number + number) for number in range(10)]
        indices = torch.cat([draw.indices for draw in draws])
        assert len(indices) == 40
        assert len(indices.unique()) == 40


def test_a_set_smaller_than_a_batch_is_read_through_evenly() -> None:
    order = BatchOrder(3, 8, flip=True)
    assert len(order) == 1
    indices = torch.cat([draw.indices for draw in first(order, 6)])
    assert len(indices) == 48
    for permutation in indices.split(3):
        assert sorted(permutation.tolist()) == [0, 1, 2]


def test_passes_and_seeds_differ() -> None:
    order, other = BatchOrder(64, 64, seed=0), BatchOrder(64, 64, seed=1)
    seen = [*first(order, 3), *first(other, 3)]
    for one, two in itertools.combinations(seen, 2):
        assert not torch.equal(one.indices, two.indices)


def test_flips_are_off_or_fair_and_leave_the_order_alone() -> None:
    plain = BatchOrder(10_000, 10_000).batch(0)
    flipped = BatchOrder(10_000, 10_000, flip=True).batch(0)
    assert not plain.flip.any()
    # A fair coin's share over 10,000 throws has a standard deviation of 0.005.
    assert abs(flipped.flip.double().mean().item() - 0.5) < 0.02
    torch.testing.assert_close(plain.indices, flipped.indices)


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_steps_per_epoch_cuts_the_same_batches_otherwise(steps: int) -> None:
    whole = first(BatchOrder(40, 4), 50)
    consumed = 0
    order = BatchOrder(40, 4, steps_per_epoch=steps, position=lambda: consumed)
    assert len(order) == steps
    for _ in range(2):
        for draw in order:
            torch.testing.assert_close(draw, whole[consumed])
            consumed += 1
    assert consumed == 2 * steps


def test_flipped_images_are_mirrored_exactly() -> None:
    images = torch.arange(4 * 3 * 2 * 5).reshape(4, 3, 2, 5).to(torch.uint8)
    dataset = DrawnImages(TensorImages(images, torch.arange(4), num_classes=4))
    batch = dataset[Draw(torch.tensor([2, 0, 2]), torch.tensor([True, False, False]))]
    expected = torch.stack([images[2].flip(-1), images[0], images[2]])
    torch.testing.assert_close(batch.images, expected)
    assert batch.labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_items", "batch_size"), [(43, 4), (41, 7), (12, 12), (8, 2), (8, 1)])
def test_each_index_is_on_one_rank_and_ranks_have_as_many_batches(
    num_items: int, batch_size: int, world_size: int
) -> None:
    orders = [
        EachOnce(num_items, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = torch.cat([draw.indices for order in orders for draw in order])
    assert sorted(seen.tolist()) == list(range(num_items))
    assert all(0 < len(draw.indices) <= batch_size for order in orders for draw in order)
    assert not any(draw.flip.any() for order in orders for draw in order)
    if batch_size > 1:
        assert len({len(order) for order in orders}) == 1


def test_fewer_items_than_ranks_leave_some_ranks_empty() -> None:
    shares = [shared_batches(2, 4, rank, 3) for rank in range(3)]
    assert [torch.cat(share).tolist() for share in shares[:2]] == [[0], [1]]
    assert shares[2] == []
    assert shared_batches(0, 4, 0, 1) == []
