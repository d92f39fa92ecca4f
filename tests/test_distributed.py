"""Layers in several processes: distributed training, and the workers of a DataLoader."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from perdure.bindings.distributed import gather, split
from perdure.bindings.torch import MemorizingAttention
from ranks import RANKS, SEGMENT, build, rank_of_two, train, words

from perdure import ArgumentError, KNNMemory


@pytest.mark.slow
def test_two_ranks_train_as_one_and_their_memories_are_their_own(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=RANKS)
    model = build()
    gradients, memory = train(model, model, words(4, 4 * SEGMENT))
    expected = model.memory_state_dict(memory)
    for rank in range(RANKS):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(saved["gradients"], gradients)
        torch.testing.assert_close(saved["memory"], expected)
        assert saved["same"]
        assert saved["uneven"] == "memory"


def test_one_rank_gathers_and_splits_what_it_has(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = build()
        _, memory = model(words(2, 20))
        again = split(gather(memory))
        expected, _ = model(words(2, 5), memory)
        torch.testing.assert_close(model(words(2, 5), again)[0], expected, rtol=0, atol=0)
        with pytest.raises(ArgumentError) as caught:
            gather(model)
        assert caught.value.argument == "memory"
    finally:
        dist.destroy_process_group()


class Passages(torch.utils.data.Dataset):
    """Segments of one document, with what a memory gave the worker that read them."""

    def __init__(self, x, memory):
        self.x, self.memory = x, memory

    def __len__(self):
        return self.x.shape[0]

    def __getitem__(self, i):
        near = self.memory.search(self.x[i].numpy()[None, None], k=3)
        return self.x[i], torch.from_numpy(near.positions[0, 0])


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_of_a_data_loader_search_and_feed_layers(workers):
    rng = np.random.default_rng(0)
    memory = KNNMemory(rows=1, heads=1, dim=16, capacity=100)
    keys = rng.standard_normal((1, 1, 80, 16), np.float32)
    memory.write(keys, keys)
    x = torch.from_numpy(rng.standard_normal((5, SEGMENT, 16), np.float32))
    expected = memory.search(x.flatten(0, 1).numpy()[None, None], k=3)  # kernels have run before workers begin
    layer = MemorizingAttention(16, 2, capacity=30, k=4, segment=SEGMENT)
    whole, _ = layer(x.flatten(0, 1)[None])
    state, outputs, positions = None, [], []
    for segment, found in torch.utils.data.DataLoader(Passages(x, memory), num_workers=workers):
        output, state = layer(segment, state)
        outputs.append(output)
        positions.append(found[0])
    np.testing.assert_array_equal(torch.cat(positions).numpy(), expected.positions[0, 0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
