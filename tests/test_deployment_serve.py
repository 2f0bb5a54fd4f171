"""The example that serves a frozen network: batches, a full queue, errors, and the end."""

import queue
import threading

import pytest
import torch
from example_scripts import load_example, needs_examples

pytestmark = needs_examples


@pytest.fixture(scope="module")
def serve():
    return load_example("serve")


class Network:
    """The sum of each image, once the gate is open; remembers the batches that it got."""

    def __init__(self):
        self.gate, self.entered, self.batches = threading.Event(), threading.Semaphore(0), []

    def __call__(self, images):
        if self.batches or images.any():  # no warm-up
            self.entered.release()
            assert self.gate.wait(30)
            self.batches.append(len(images))
        if images.isnan().any():
            raise FloatingPointError("NaN")
        return images.sum((1, 2, 3))


def images(n, value=1.0):
    return torch.full((n, 1, 2, 2), value)


def start(serve, network, **options):
    return serve.Server(network, (1, 2, 2), **{"workers": 1, "max_batch": 4, "max_wait": 0.0} | options)


def test_requests_are_put_together_and_answered_in_their_own_order(serve):
    network = Network()
    server = start(serve, network, max_wait=0.05)
    sizes = [4, 1, 2, 3, 6, 1]  # the first fills a batch; 6 are more than one holds
    futures = []
    for number, n in enumerate(sizes):
        futures.append(server.submit(images(n, number + 1.0)))
        if number == 0:
            assert network.entered.acquire(timeout=30)  # it is alone in its batch
    network.gate.set()
    for number, (n, future) in enumerate(zip(sizes, futures)):
        assert torch.equal(future.result(30), torch.full((n,), 4 * (number + 1.0)))
    server.close()
    assert network.batches == server.batches == [4, 3, 3, 6, 1]


def test_a_full_queue_is_told_and_the_end_answers_what_waits(serve):
    network = Network()
    server = start(serve, network, max_queued=2)
    futures = [server.submit(images(4))]
    assert network.entered.acquire(timeout=30)
    futures += [server.submit(images(4)) for _ in range(2)]
    with pytest.raises(queue.Full):
        server.submit(images(4))
    futures[2].cancel()
    ending = threading.Thread(target=server.close)
    ending.start()
    network.gate.set()
    ending.join(30)
    assert not ending.is_alive() and not any(worker.is_alive() for worker in server._workers)
    assert all(future.result(0).shape == (4,) for future in futures[:2]) and network.batches == [4, 4]
    with pytest.raises(RuntimeError, match="closed"):
        server.submit(images(1))


def test_an_error_reaches_its_clients_and_the_worker_goes_on(serve):
    network = Network()
    network.gate.set()
    server = start(serve, network)
    with pytest.raises(FloatingPointError):
        server.submit(images(1, float("nan"))).result(30)
    assert server.submit(images(1)).result(30) == 4
    for wrong in (torch.zeros(1, 1, 2, 3), torch.zeros(0, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"images must be \[n, 1, 2, 2\]"):
            server.submit(wrong)
    server.close()


def test_the_example(serve, capsys):
    pytest.importorskip("safetensors")
    arguments = ["--requests", "40", "--clients", "6", "--max-queued", "2", "--size", "16", "--max-batch", "4"]
    assert serve.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 requests, ") and [line.split()[0] for line in lines[1:]] == [
        "latency:",
        "refused",
        "largest",
    ]


def test_an_answer_that_is_wrong_is_told(serve, capsys, monkeypatch):
    """One NaN among many right answers, wherever it comes."""
    answered = []

    def network(images):
        answered.append(images)
        y = images.sum((1, 2, 3))
        return y * float("nan") if len(answered) == 4 else y  # behind two of the warm-up

    monkeypatch.setattr(serve, "load", lambda folder, example: network)
    arguments = ["--requests", "9", "--clients", "1", "--workers", "1", "--size", "4", "--max-wait", "0"]
    assert serve.main(arguments) == 1 and "alone: nan of" in capsys.readouterr().out
