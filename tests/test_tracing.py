"""Converting and freezing while other threads do the same or run models, and when it is interrupted."""

import threading

import pytest
import torch
import toys
from torch import nn
from torch.fx import _symbolic_trace

import dynexec
from dynexec.executors.proof import relative_error
from dynexec.nn.tracing import Tracer

CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__


@pytest.fixture(autouse=True)
def put_back():
    """So that a failure here is no failure of every test behind."""
    yield
    nn.Module.__call__, nn.Module.__getattr__, _symbolic_trace.CURRENT_PATCHER = CALL, GETATTR, None


class Waits(nn.Module):
    """Says that it is being traced, and goes on when it may."""

    def __init__(self):
        super().__init__()
        self.layer, self.entered, self.go_on = nn.Linear(2, 2), threading.Event(), threading.Event()

    def forward(self, x):
        self.entered.set()
        assert self.go_on.wait(30)
        return self.layer(x)


def test_other_threads_run_models_meanwhile():
    module, other, graphs = Waits(), nn.Sequential(nn.Linear(2, 3)), []
    thread = threading.Thread(target=lambda: graphs.append(Tracer().trace(module)))
    thread.start()
    try:
        assert module.entered.wait(30)
        assert other(torch.ones(1, 2)).shape == (1, 3)
    finally:
        module.go_on.set()
        thread.join(30)
    assert [node.op for node in graphs[0].nodes] == ["placeholder", "call_module", "output"]
    assert nn.Module.__call__ is CALL


def test_one_traces_at_a_time():
    first, second = Waits(), Waits()
    threads = [threading.Thread(target=Tracer().trace, args=(module,)) for module in (first, second)]
    threads[0].start()
    try:
        assert first.entered.wait(30)
        threads[1].start()
        assert not second.entered.wait(0.2)
    finally:
        for module, thread in zip((first, second), threads):
            module.go_on.set()
            thread.join(30)
    assert second.entered.is_set() and nn.Module.__call__ is CALL and nn.Module.__getattr__ is GETATTR


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_while_torch_puts_back(monkeypatch, late):
    """``late``: when all is put back, but torch still takes it for being replaced, and would do so again."""
    revert = _symbolic_trace._Patcher.revert_all_patches

    def interrupt(patcher):
        if late:
            revert(patcher)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_symbolic_trace._Patcher, "revert_all_patches", interrupt)
        Tracer().trace(nn.Sequential(nn.Linear(2, 2)))
    with _symbolic_trace._maybe_revert_all_patches():  # as torch.compile does
        pass
    assert nn.Module.__call__ is CALL and nn.Module.__getattr__ is GETATTR


def test_models_are_frozen_in_threads(tmp_path):
    errors = []

    def work(seed):
        try:
            model = toys.finish(toys.torchvision_style(), seed=seed)
            blocks = dynexec.convert(model).num_blocks
            x, decisions = toys.images(2), torch.ones(2, blocks, dtype=torch.bool)
            frozen = dynexec.freeze(model, x, cost_cache=tmp_path / "costs.json")
            assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < 1e-4
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and nn.Module.__call__ is CALL
