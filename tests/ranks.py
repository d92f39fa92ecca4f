"""One of several processes that train together: in a module of its own, for started processes find it by name."""

import torch
import torch.distributed as dist
from perdure.bindings.distributed import gather, split
from perdure.bindings.torch import MemorizingAttention, MemoryTransformer, TransformerXLAttention

from perdure import ArgumentError

SEGMENT, RANKS = 6, 2


def build():
    torch.manual_seed(0)
    local = {"dim": 16, "heads": 2, "segment": SEGMENT, "window": 4}
    memorizing = MemorizingAttention(**local, capacity=30, k=4, dtype="float64")
    return MemoryTransformer(11, [TransformerXLAttention(**local), memorizing]).double()


def words(rows, n):
    return torch.randint(11, (rows, n), generator=torch.Generator().manual_seed(1))


def train(model, own, x):
    """Gradients of every step, and the memory after the last."""
    memory, gradients = own.memory(x.shape[0]), []
    for part in x.split(SEGMENT, dim=1):
        logits, memory = model(part, memory)
        model.zero_grad()
        logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in own.parameters()])
    return gradients, memory


def rank_of_two(rank, folder):
    """One of two processes, with half of the rows."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    model = build()
    if rank:
        with torch.no_grad():
            model.embedding.weight.add_(1)  # what the wrapper's first broadcast puts right
    x = words(4, 4 * SEGMENT)[2 * rank : 2 * rank + 2]
    gradients, memory = train(torch.nn.parallel.DistributedDataParallel(model), model, x)
    whole = gather(memory)
    mine = split(whole)
    following = words(2, SEGMENT)
    same = torch.equal(model(following, mine)[0], model(following, memory)[0])
    saved = {"gradients": gradients, "memory": model.memory_state_dict(whole), "same": same}
    try:
        split(whole[0].select([0, 1, 2]))
    except ArgumentError as error:
        saved["uneven"] = error.argument
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
