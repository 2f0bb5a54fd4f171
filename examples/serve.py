"""Serve a frozen network from several threads: requests are put together to batches, and the queue is bounded.

    python examples/serve.py [FOLDER] [--workers 2] [--threads 1] [--requests 500]

FOLDER is one that dynexec.save wrote, of a network for images that has its own policy; without it a BlockDrop network
with fresh weights is saved and loaded. Clients in the same process send batches of 1 to 4 images, each the next one as
soon as it has its answer, and every answer is compared with what the network gives alone.
"""

import argparse
import queue
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

import dynexec


class Server:
    """Threads that share one network and answer requests for some images in batches of many.

    Parameters
    ----------
    network : callable
        ``network(images)`` gives a tensor ``[N, ...]`` for images ``[N, C, H, W]``, safely from any thread.
    shape : tuple of int
        ``[C, H, W]`` of the images.
    workers : int
    max_batch : int
        Images in a batch, but for a request that has more by itself.
    max_wait : float
        Seconds that a worker that has a request waits for more.
    max_queued : int
        Requests that may wait for a worker.
    """

    def __init__(self, network, shape, *, workers=2, max_batch=16, max_wait=0.002, max_queued=64):
        self.network, self.shape, self.max_batch, self.max_wait = network, tuple(shape), max_batch, max_wait
        self.requests, self.batches = queue.Queue(max_queued), []
        self._lock, self._closed = threading.Lock(), False
        for n in sorted({1, max_batch}):  # what is made in the first calls is made before the first request
            network(torch.zeros(n, *self.shape))
        self._workers = [threading.Thread(target=self._work, name=f"worker {n}") for n in range(workers)]
        for worker in self._workers:
            worker.start()

    def submit(self, images):
        """The future output for images ``[n, C, H, W]``; ``queue.Full`` where too many requests wait already."""
        if tuple(images.shape[1:]) != self.shape or len(images) == 0:
            raise ValueError(f"images must be [n, {', '.join(map(str, self.shape))}], got {tuple(images.shape)}")
        future = Future()
        with self._lock:  # nothing comes behind the last entry, which close puts there
            if self._closed:
                raise RuntimeError("the server is closed")
            self.requests.put_nowait((images, future))
        return future

    def close(self):
        """Take no more requests, answer those that wait, and return when all workers have ended."""
        with self._lock:
            self._closed = True
        for _ in self._workers:
            self.requests.put(None)
        for worker in self._workers:
            worker.join()

    def _work(self):
        first, open_ = self.requests.get(), True
        while first is not None:
            batch, first, open_ = self._gather(first)
            self._answer([request for request in batch if request[1].set_running_or_notify_cancel()])
            if first is None and open_:
                first = self.requests.get()

    def _gather(self, first):
        """Requests for one batch, the one that no longer fits, if any, and whether more may come."""
        batch, count, until = [first], len(first[0]), time.monotonic() + self.max_wait
        while count < self.max_batch:
            try:
                request = self.requests.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                break
            if request is None:
                return batch, None, False
            if count + len(request[0]) > self.max_batch:
                return batch, request, True
            batch.append(request)
            count += len(request[0])
        return batch, None, True

    def _answer(self, batch):
        if not batch:
            return
        sizes = [len(images) for images, _ in batch]
        try:
            outputs = self.network(torch.cat([images for images, _ in batch])).split(sizes)
        except Exception as error:  # the clients' to know; the worker goes on
            for _, future in batch:
                future.set_exception(error)
            return
        self.batches.append(sum(sizes))
        for (_, future), output in zip(batch, outputs):
            future.set_result(output)


def ask(server, requests):
    """A client: (images, answer, seconds) of each request, and how often the server was full."""
    answers, refused = [], 0
    for images in requests:
        start = time.perf_counter()
        while True:
            try:
                future = server.submit(images)
                break
            except queue.Full:
                refused += 1
                time.sleep(0.005)
        answers.append((images, future.result(), time.perf_counter() - start))
    return answers, refused


def load(folder, example):
    """The frozen network in a folder; of a network with fresh weights, saved before, where there is none."""
    if folder is not None:
        return dynexec.load(folder)
    with tempfile.TemporaryDirectory() as made:
        net = dynexec.models.create_model("blockdrop_resnet32_cifar10").eval()
        dynexec.save(net, Path(made) / "net", example)
        return dynexec.load(Path(made) / "net")


def main(argv=None):
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="written by dynexec.save")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker's network (%(default)s)")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images (%(default)s)")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-wait", type=float, default=2, help="milliseconds (%(default)s)")
    parser.add_argument("--max-queued", type=int, default=64)
    args = parser.parse_args(argv)
    if min(args.workers, args.threads, args.clients, args.requests, args.size, args.max_batch, args.max_queued) < 1:
        parser.error("all numbers must be at least 1")
    torch.set_num_threads(args.threads)
    shape = 3, args.size, args.size
    generator = torch.Generator().manual_seed(0)
    network = load(args.folder, torch.randn(args.max_batch, *shape, generator=generator))
    sizes = torch.randint(1, 5, (args.requests,), generator=generator).tolist()
    requests = [torch.randn(n, *shape, generator=generator) for n in sizes]
    limits = {"max_batch": args.max_batch, "max_wait": args.max_wait / 1000, "max_queued": args.max_queued}
    server = Server(network, shape, workers=args.workers, **limits)
    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(args.clients) as clients:
            shares = [requests[number :: args.clients] for number in range(args.clients)]
            found = list(clients.map(lambda share: ask(server, share), shares))
    finally:
        server.close()
    seconds = time.perf_counter() - start
    answers = [answer for share, _ in found for answer in share]
    times = torch.tensor([1000 * taken for _, _, taken in answers], dtype=torch.float64)
    errors = [(output - network(images)).abs().max() / output.abs().max() for images, output, _ in answers]
    error = torch.stack(errors).max().item()  # NaN where one is
    median, late, latest = times.quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)).tolist()
    images = sum(sizes)
    print(f"{len(answers)} requests, {images} images in {len(server.batches)} batches, {images / seconds:.0f} images/s")
    print(f"latency: median {median:.1f} ms, 95 % {late:.1f} ms, 99 % {latest:.1f} ms")
    print(f"refused because the queue was full: {sum(refused for _, refused in found)}")
    print(f"largest difference to the network alone: {error:.1e} of the largest value")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
