"""BlockDrop on handwritten digits, trained by any number of processes on any number of machines.

    python examples/train_distributed.py                                             # one process
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py           # two on this machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_distributed.py

The last line is for each of two machines. Each process trains on its own share of the images, on its own GPU where
there are any (NCCL), else on the CPU (Gloo). Three stages: the network, its policy under the curriculum, both together.
After each epoch the first process writes a checkpoint: run the same command again after an interruption, with as many
processes, and training goes on from there to the very same weights. Another --seed splits the data otherwise, and has
checkpoints of its own.

Scalars (keep rate overall and per block, reward, loss) go to TensorBoard where it is installed, else to log.jsonl.
Needs scikit-learn.
"""

import argparse
import json
import os
import sys
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dynexec.models.digits import digits_network, load_digits
from dynexec.models.training import evaluate, fine_tune, train_dense, train_policy
from dynexec.nn import DynamicNetwork
from dynexec.policy import keep_rates

#: Name -> (function, its settings): as :func:`dynexec.models.digits.train_digits` has them.
STAGES = {
    "network": (train_dense, {}),
    "policy": (train_policy, dict(penalty=-0.3, exploration=0.9, entropy=0.02, learning_rate=3e-3)),
    "fine-tuning": (fine_tune, dict(penalty=-0.3, exploration=0.98, learning_rate=1e-3)),
}


def join(timeout):
    """This process's (rank, number of processes, device); ``torchrun`` says the first two."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    # How long a process waits for one that stands still before it gives up; one that dies is noticed at once by Gloo.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    return dist.get_rank(), dist.get_world_size(), device


def wrap(net):
    """The network whose gradients are averaged over all processes; it shares its weights with ``net``."""
    net.policy.vnet.requires_grad_(False)  # part of the published policy, but nothing uses it
    # Apart: steps of a stage call one of them, or both, and each must see the backward pass of its own forward.
    return DynamicNetwork(DistributedDataParallel(net.backbone), DistributedDataParallel(net.policy))


class JsonLog:
    """As TensorBoard's writer: one line ``{"step": ..., name: value}`` per call, in a file."""

    def __init__(self, folder):
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8")

    def add_scalar(self, name, value, step):
        print(json.dumps({"step": step, name: value}), file=self.file, flush=True)

    def close(self):
        self.file.close()


def open_log(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return JsonLog(folder)
    return SummaryWriter(folder)


def train(net, data, args, rank, world, device):
    """All three stages; the first process reports."""
    share = len(data.train[0]) // world  # equal ones: all processes must take equally many steps
    images, labels = (part[rank::world][:share].to(device) for part in data.train)
    validation = [part.to(device) for part in data.validation]
    trained = wrap(net) if dist.is_initialized() else net
    # Each process draws its own decisions, orders and shifts: through PyTorch's generators, as those are per device.
    torch.manual_seed(args.seed * world + rank)
    start, done = perf_counter(), 0
    with closing(open_log(args.output)) if rank == 0 else nullcontext() as log:
        for (stage, (function, settings)), epochs in zip(STAGES.items(), args.epochs):
            if stage == "policy":
                # Over 0.6 of the epochs the curriculum opens all blocks.
                settings = {**settings, "blocks_per_epoch": net.num_blocks / (0.6 * max(epochs, 1))}

            def report(record, stage=stage, epochs=epochs, first=done):
                if rank != 0:
                    return
                scalars = {f"{stage}/{name}": value for name, value in record.items() if name != "epoch"}
                if stage != "network":
                    scalars |= keep_rates(evaluate(net, *validation).decisions)
                for name, value in scalars.items():
                    log.add_scalar(name, value, first + record["epoch"])
                shown = ", ".join(f"{name} {value:.3f}" for name, value in record.items() if name != "epoch")
                print(f"{stage} {record['epoch'] + 1}/{epochs}: {shown}, {perf_counter() - start:.0f} s", flush=True)

            function(
                trained, images, labels, epochs=epochs, batch_size=max(1, 64 // world), augment=data.shift,
                on_epoch=report, checkpoint=args.output / f"{stage}-{args.seed}.pt", **settings,
            )  # fmt: skip
            done += epochs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/distributed"), help="folder, seen by all machines or "
                        "at least by the first process (%(default)s)")  # fmt: skip
    parser.add_argument("--epochs", type=int, nargs=3, default=[12, 40, 10], metavar=tuple(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for another process (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rank, world, device = join(args.timeout)
    if rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
    data = load_digits(args.seed)
    torch.manual_seed(args.seed)  # the same network everywhere
    net = digits_network().to(device)
    train(net, data, args, rank, world, device)
    if rank == 0:
        torch.save(net.state_dict(), args.output / "weights.pt")
        result = evaluate(net.cpu(), *data.test)
        print(f"test: accuracy {result.accuracy:.3f}, {result.kept:.1f} of {net.num_blocks} blocks kept")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
