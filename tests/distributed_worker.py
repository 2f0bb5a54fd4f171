"""What two processes compute together is what one computes alone: run by test_distributed.py in each of the two.

    python distributed_worker.py FOLDER RANK [FAULT]

Each case compares with the same step on the joined batch, which this process takes by itself. What became of it goes
to FOLDER/RANK.json: by case None, or the traceback.
"""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import toys
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dynexec
from dynexec.models import blockdrop_resnet, spottune_resnet26, training
from dynexec.nn import DynamicNetwork, dynamic_blocks
from dynexec.policy import curriculum_loss, force_untrained, sample, threshold, usage_reward

WORLD = 2
SAMPLES = 3  # per process
TIMEOUT = timedelta(seconds=60)  # also for the start of the other process, on a busy machine


def uneven(columns):
    """(name, decisions bool ``[2 * SAMPLES, columns]`` of both processes), which keep other numbers of samples."""
    none, full = torch.zeros(2 * SAMPLES, columns, dtype=torch.bool), torch.ones(2 * SAMPLES, columns).bool()
    first, second = none.clone(), full.clone()
    first[0] = True
    second[:SAMPLES] = False
    mixed = torch.rand(2 * SAMPLES, columns, generator=torch.Generator().manual_seed(1)) < 0.5
    mixed[:SAMPLES, 0] = False  # by no sample of the first process
    mixed[SAMPLES:, 1] = False
    mixed[:, 2] = False  # by nobody
    mixed[:SAMPLES, -1] = True
    yield from {"one sample": first, "one process": second, "mixed": mixed, "nobody": none, "all": full}.items()


def mine(batch):
    return batch[dist.get_rank() * SAMPLES :][:SAMPLES]


def decided(model, x, decisions):
    with dynexec.decide(decisions):
        return model(x)


def compare(build, wrap, size=9):
    """Two steps of SGD, for each of several decisions, in both ways: equal losses, gradients and weights."""
    alone, together = build(), build()
    together = wrap(together)
    columns = len([block for block in dynamic_blocks(alone) if block.placement])
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in (alone, together)]
    x = torch.randn(2 * SAMPLES, 3, size, size, generator=torch.Generator().manual_seed(2)).double()
    target = torch.arange(2 * SAMPLES) % 5
    for name, decisions in uneven(columns):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = nn.functional.cross_entropy(decided(alone, x, decisions), target)
        loss = nn.functional.cross_entropy(decided(together, mine(x), mine(decisions)), mine(target))
        expected.backward(), loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        assert_close(mean / WORLD, expected.detach(), f"{name}: loss")
        actual = dict(together.named_parameters())
        for key, parameter in alone.named_parameters():
            other = actual[key if key in actual else f"module.{key}"]
            assert (other.grad is None) == (not parameter.requires_grad), f"{name}: {key}"
            if parameter.requires_grad:
                assert_close(whole(other.grad), parameter.grad, f"{name}: gradient of {key}")
        for optimizer in optimizers:
            optimizer.step()
        for key, parameter in alone.named_parameters():
            other = actual[key if key in actual else f"module.{key}"]
            assert_close(whole(other), parameter, f"{name}: {key} after the step")
    return together


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_close(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, msg=lambda text: f"{what}: {text}")


def plain(style="torchvision"):
    torch.manual_seed(0)
    return toys.STYLES[style]().double()


def converted(style="torchvision", **options):
    model = plain(style)
    dynexec.convert(model, **options)
    for block in dynamic_blocks(model):
        for parameter in block.fine_tuned.parameters() if options else ():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def blockdrop():
    torch.manual_seed(0)
    net = blockdrop_resnet((2, 2), (4, 8), num_classes=5, policy_widths=(2, 4))
    net.policy.vnet.requires_grad_(False)  # nothing uses it
    return toys.finish(net.double())


def spottune():
    torch.manual_seed(0)
    return toys.finish(spottune_resnet26(num_classes=5, blocks=(2, 1), widths=(4, 8), stem_width=4).double())


def shard(model):
    """Each block, whole, and the rest with the root."""
    blocks = [block for block in dynamic_blocks(model) if block.placement]
    for block in blocks or [block for stage in model.layers for block in stage]:
        fully_shard(block)
    return fully_shard(model)


def ddp_converted():
    for style in toys.STYLES:
        compare(lambda: converted(style), DistributedDataParallel)  # noqa: B023


def ddp_own_network():
    compare(lambda: blockdrop().backbone, DistributedDataParallel, size=8)


def ddp_second_weights():
    compare(lambda: converted(fine_tune="nothing"), DistributedDataParallel)
    compare(lambda: converted(fine_tune="convolutions"), DistributedDataParallel)
    compare(lambda: spottune().backbone, DistributedDataParallel, size=8)


def ddp_wrapped_before_convert():
    def wrap(_):
        model = DistributedDataParallel(plain())
        dynexec.convert(model)
        return model

    together = compare(converted, wrap)
    assert dynexec.revert(together) == 5


def ddp_second_weights_after_wrapping_are_refused():
    model = DistributedDataParallel(plain())
    try:
        dynexec.convert(model, fine_tune="nothing")
    except ValueError:
        return
    raise AssertionError("convert gave second weights to a wrapped model: DistributedDataParallel does not know them")


def ddp_policy_step():
    """One step of REINFORCE; each process draws with its own generator, the one alone uses both."""

    def step(net, x, y, drawn, trained):
        probabilities = net.policy(x)
        greedy = force_untrained(threshold(probabilities.detach()), trained)
        with torch.no_grad():
            right = [net(x, decisions).argmax(1) == y for decisions in (drawn(probabilities), greedy)]
        advantage = usage_reward(drawn(probabilities), right[0]) - usage_reward(greedy, right[1])
        loss = curriculum_loss(probabilities, drawn(probabilities), advantage, trained=trained)
        net.policy.zero_grad()
        loss.backward()
        return loss.detach()

    def draw(rank, trained):
        def drawn(probabilities):
            generator = torch.Generator().manual_seed(10 + rank)
            return force_untrained(sample(probabilities, generator=generator, exploration=0.8), trained)

        return drawn

    alone, together = blockdrop(), blockdrop()
    together = DynamicNetwork(DistributedDataParallel(together.backbone), DistributedDataParallel(together.policy))
    x = torch.randn(2 * SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    y = torch.arange(2 * SAMPLES) % 5
    for trained in (torch.tensor([False, False, False, True]), torch.ones(4).bool()):
        both = [draw(rank, trained) for rank in range(WORLD)]

        def joined(probabilities, both=both):
            return torch.cat([drawn(part) for drawn, part in zip(both, probabilities.split(SAMPLES), strict=True)])

        expected = step(alone, x, y, joined, trained)
        mean = step(together, mine(x), mine(y), both[dist.get_rank()], trained)
        dist.all_reduce(mean)
        assert_close(mean / WORLD, expected, "loss")
        for (name, parameter), other in zip(alone.policy.named_parameters(), together.policy.parameters()):
            if parameter.requires_grad:
                assert_close(other.grad, parameter.grad, name)


def ddp_library_trainers():
    """The trainers of dynexec.models.training: one network in all processes, and one history."""
    folder = Path(sys.argv[1])
    x, y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(dist.get_rank())), torch.arange(8) % 5
    ends = []
    for run, seed in enumerate((dist.get_rank(), dist.get_rank(), 99)):  # the third reads what the second one wrote
        net = blockdrop().float()
        net = DynamicNetwork(DistributedDataParallel(net.backbone), DistributedDataParallel(net.policy))
        options = dict(epochs=2, batch_size=4, generator=torch.Generator().manual_seed(seed))
        histories = []
        for trainer in (training.train_dense, training.train_policy, training.fine_tune):
            if run:
                options["checkpoint"] = folder / f"{trainer.__name__}.pt"
            histories.append(trainer(net, x, y, **options))
        state = torch.cat([value.detach().double().flatten() for value in net.parameters()])
        everyones = [torch.empty_like(state) for _ in range(WORLD)]
        dist.all_gather(everyones, state)
        assert torch.equal(*everyones), "the processes have different networks"
        both = [None] * WORLD
        dist.all_gather_object(both, histories)
        assert both[0] == both[1]
        drawn = torch.rand(2, generator=options["generator"])
        ends.append((state, histories, drawn))
    for state, histories, drawn in ends[1:]:
        assert torch.equal(state, ends[0][0]) and histories == ends[0][1] and torch.equal(drawn, ends[0][2])


def ddp_faults_of_a_training_reach_every_process():
    net = DynamicNetwork(DistributedDataParallel(blockdrop().float().backbone))
    x, y = torch.zeros(9, 3, 8, 8), torch.zeros(9).long()
    path, count = Path(sys.argv[1]) / "damaged.pt", 8 + dist.get_rank()  # a step more in the second process
    if dist.get_rank() == 0:
        path.write_bytes(b"damaged")
    for images, file, what in ((count, None, "images: [8, 9]"), (8, path, "damaged.pt' is damaged")):
        try:
            training.train_dense(net, x[:images], y[:images], epochs=1, batch_size=4, checkpoint=file)
        except ValueError as error:
            assert what in str(error), error
        else:
            raise AssertionError("no error")


def fsdp_converted():
    for style in toys.STYLES:
        compare(lambda: converted(style), shard)  # noqa: B023
    compare(converted, fully_shard)


def fsdp_own_network():
    compare(lambda: blockdrop().backbone, shard, size=8)


def fsdp_second_weights():
    compare(lambda: converted(fine_tune="convolutions"), shard)
    compare(lambda: spottune().backbone, shard, size=8)


def fsdp_sharded_before_convert():
    def wrap(_):
        model = shard(plain())
        dynexec.convert(model)
        return model

    model = compare(converted, wrap)
    assert dynexec.revert(model) == 5


def fsdp_after_convert_cannot_be_reverted():
    model = shard(converted())
    try:
        dynexec.revert(model)
    except ValueError as error:
        assert "a block is a FSDPDynamicBasicBlock since it was converted: undo that change first" in str(error)
    else:
        raise AssertionError("no error")


def fsdp_second_weights_after_sharding_are_refused():
    model = shard(plain())
    classes = [type(module) for module in model.modules()]
    try:
        dynexec.convert(model, fine_tune="nothing")
    except (ValueError, AssertionError) as error:
        assert "FSDP does not support deepcopy" in str(error) or "fine_tune" in str(error)
    else:
        raise AssertionError("no error")
    assert classes == [type(module) for module in model.modules()]


def fsdp_state():
    """Sharded files, and one file of whole tensors that an unsharded network reads without executing code."""
    folder = Path(sys.argv[1])
    model = compare(converted, shard)
    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder / "sharded")
    other = shard(converted("torchvision"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=folder / "sharded")
    set_model_state_dict(other, state)
    x, decisions = torch.randn(4, 3, 9, 9).double(), torch.rand(4, 5) < 0.5
    dist.broadcast(decisions, 0), dist.broadcast(x, 0)
    with torch.no_grad():
        expected = decided(model, x, decisions)
        assert torch.equal(decided(other, x, decisions), expected)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            torch.save(state, folder / "whole.pt")
            alone = plain()
            alone.load_state_dict(torch.load(folder / "whole.pt", weights_only=True))
            dynexec.convert(alone)
            assert_close(decided(alone, x, decisions), expected, "output")


def sync_batch_norm_trains_on_gpus_only():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(converted())
    x, decisions = torch.randn(SAMPLES, 3, 9, 9).double(), torch.rand(SAMPLES, 5) < 0.5
    assert_close(decided(model, x, decisions), decided(converted(), x, decisions), "in evaluation mode")
    try:
        decided(model.train(), x, decisions)
    except ValueError as error:
        assert "SyncBatchNorm expected input tensor to be on" in str(error)
    else:
        raise AssertionError("it works now: compare it with BatchNorm on the joined batch, and say so in the docs")


CASES = {name: case for name, case in list(globals().items()) if name.startswith(("ddp_", "fsdp_", "sync_"))}


def run_cases(folder, rank):
    results = {}
    for name, case in CASES.items():
        try:
            case()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))


def train_until(fault, rank):
    """Steps of data-parallel training, in the third of which the second process dies, or stands still."""
    group = dist.new_group(timeout=timedelta(seconds=4))
    model = DistributedDataParallel(converted(), process_group=group)
    for step in range(1000):
        if step == 2 and rank == 1:
            if fault == "dies":
                os._exit(3)
            time.sleep(600)
        x, decisions = torch.randn(SAMPLES, 3, 9, 9).double(), torch.rand(SAMPLES, 5) < 0.5
        decided(model, x, decisions).square().mean().backward()
        model.zero_grad()


def main():
    folder, rank, *fault = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    if fault:
        train_until(*fault, rank)
    run_cases(folder, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
