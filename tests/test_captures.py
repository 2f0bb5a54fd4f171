"""What of CUDA graphs needs no GPU: which function is captured, on which stream, and what comes back."""

from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import toys
from torch.utils._pytree import tree_flatten

from dynexec.executors import graphs
from dynexec.executors.launches import LaunchPrograms


@pytest.fixture
def captured(monkeypatch):
    """Graphs on a CPU; a function that ``waits`` or is ``short`` cannot be captured. What was, in order."""
    found = []

    class Graph:
        def __init__(self, function, x, decisions, layout):
            if hasattr(function, "waits"):
                raise RuntimeError(f"{function.__name__} waits for the device")
            if hasattr(function, "short"):
                raise torch.OutOfMemoryError("none left")
            found.append(function.__name__)
            self.function = function

        def replay(self, x, decisions):
            return self.function(x, decisions)

    monkeypatch.setattr(graphs, "_Graph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=lambda event: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


def functions(*names):
    """Functions that give their names; those in capitals cannot be captured."""
    found = []
    for name in names:

        def function(x, decisions, name=name):
            return name

        function.__name__ = name
        if name.isupper():
            function.waits = True
        found.append(function)
    return found


@pytest.mark.parametrize(
    "names, runs, replaced, failed",
    [
        (["a"], "a", None, None),
        (["a", "b"], "a", None, None),
        (["A", "b", "c"], "b", "RuntimeError: A waits for the device", None),
        (["A", "B", "c"], "c", "RuntimeError: A waits for the device", None),
        (["A", "B"], "B", None, "RuntimeError: A waits for the device"),
        (["A"], "A", None, "RuntimeError: A waits for the device"),
    ],
)
def test_the_first_function_that_can_be_is_captured(names, runs, replaced, failed, captured):
    function, *instead = functions(*names)
    found = graphs.Graphs(function, instead)
    x = torch.zeros(2, 3)
    for _ in range(3):
        assert found(x, None, "way") == runs
    key = "way", (2, 3), True
    assert found.replaced == ({key: replaced} if replaced else {})
    assert found.failed == ({key: failed} if failed else {})
    assert captured == ([] if failed else [runs])  # once


def test_the_graph_not_used_for_longest_gives_way(captured):
    (function,) = functions("a")
    found = graphs.Graphs(function)
    for samples in (1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 1, 2):
        found(torch.zeros(samples), None, "way")
    assert [shape for _, (shape,), _ in found.graphs] == [4, 5, 6, 7, 8, 9, 1, 2]
    assert len(captured) == 10


def test_what_cannot_be_captured_leaves_the_others_their_graphs(captured):
    function, waits = functions("a", "A")
    found = graphs.Graphs(function)
    for samples in range(1, 9):
        found(torch.zeros(samples), None, "way")
    found.function = waits
    assert found(torch.zeros(9), None, "way") == "A"
    assert [shape for _, (shape,), _ in found.graphs] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["A", "b"]])
def test_a_shortage_of_memory_passes(names, captured):
    """Meanwhile the last function runs without a graph, and ``failed`` says why; then there is one."""
    *_, last = given = functions(*names)
    short = next(function for function in given if function.__name__.islower())
    found = graphs.Graphs(given[0], given[1:])
    x, key = torch.zeros(2, 3), ("way", (2, 3), True)
    short.short = True
    for _ in range(2):
        assert found(x, None, "way") == last.__name__
        assert found.failed == {key: "OutOfMemoryError: none left"} and not found.replaced and not captured
    del short.short
    assert found(x, None, "way") == last.__name__ and not captured  # after the second time it waits for a call
    for _ in range(2):
        assert found(x, None, "way") == short.__name__
    assert not found.failed and captured == [short.__name__]
    assert list(found.replaced) == [key] * names[0].isupper()


def test_a_shortage_of_memory_that_lasts_is_met_ever_less_often(captured, monkeypatch):
    (function,) = functions("a")
    function.short = True
    found, calls, tries, make = graphs.Graphs(function), [], [], graphs.Graphs._make
    monkeypatch.setattr(graphs.Graphs, "_make", lambda *arguments: tries.append(len(calls)) or make(*arguments))
    for _ in range(20):
        calls.append(found(torch.zeros(2), None, "way"))
    assert calls == ["a"] * 20 and tries == [0, 1, 3, 7, 15]


def test_where_memory_is_short_the_graph_not_used_for_longest_gives_way(captured):
    """But no more of them: a shape that never fits would take one after the other from the rest."""
    (function,) = functions("a")
    found = graphs.Graphs(function)
    for samples in range(1, 9):
        found(torch.zeros(samples), None, "way")
    function.short = True
    for _ in range(3):
        found(torch.zeros(9), None, "way")
        assert [shape for _, (shape,), _ in found.graphs] == [2, 3, 4, 5, 6, 7, 8]
    del function.short
    for _ in range(3):
        found(torch.zeros(9), None, "way")
    assert [shape for _, (shape,), _ in found.graphs] == [2, 3, 4, 5, 6, 7, 8, 9]


def test_streams_are_not_shared_while_there_are_others(monkeypatch):
    """torch gives its 32 in turn, whoever still uses them."""
    number = count()

    class Stream:
        __slots__ = ("cuda_stream",)  # no weak references

        def __init__(self, device):
            self.cuda_stream = next(number) % 32

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    device = torch.device("cpu")
    kept = [graphs.take_stream(device) for _ in range(20)]
    for _ in range(100):
        assert graphs.take_stream(device).stream.cuda_stream not in {taken.stream.cuda_stream for taken in kept}
    kept += [graphs.take_stream(device) for _ in range(12)]
    assert len({taken.stream.cuda_stream for taken in kept}) == 32
    assert graphs.take_stream(device).stream.cuda_stream in range(32)  # one of them is shared


def test_what_a_graph_gives_is_in_memory_of_its_own():
    """Also where it became, in place, of what the graph reads; but decisions come back as they were given."""
    graph = object.__new__(graphs._Graph)  # captured nowhere
    graph.inputs = [toys.images(2), torch.ones(2, 3).bool()]
    graph.results, graph.structure = tree_flatten((graph.inputs[0], graph.inputs[1], None))
    graph.graph = SimpleNamespace(replay=lambda: graph.inputs[0].relu_())
    x, decisions = toys.images(2), torch.zeros(1, 3).bool().expand(2, 3)
    before = x.clone()
    y, returned, nothing = graph.replay(x, decisions)
    assert torch.equal(y, before.relu()) and torch.equal(x, before) and nothing is None
    assert y.data_ptr() != graph.inputs[0].data_ptr() and returned is decisions
    graph.inputs[1] = None
    graph.results, graph.structure = tree_flatten((graph.inputs[0], None))
    y, nothing = graph.replay(x, None)
    assert torch.equal(y, before.relu()) and nothing is None


def test_whose_memory_for_shared_sums(monkeypatch):
    """A network's own graphs run one after the other; others, maybe captured on the same stream, when they like."""
    pytest.importorskip("triton")
    capturing, handle = False, 7
    monkeypatch.setattr("dynexec.kernels.conv.Workspace", lambda device: object())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=handle))
    programs = LaunchPrograms(1)

    def take():
        return programs.take_workspace(torch.device("cuda"))

    eager = take()
    assert take() is eager and not graphs.makes_graph()
    with graphs._making():
        own = take()
        assert own is not eager and graphs.makes_graph()
    capturing = True
    assert take() not in (own, eager, take())
    with graphs._making():
        handle = 8
        assert take() is own
    capturing = False
    assert take() not in (own, eager)
    programs.renew(None, "fused")
    with graphs._making():
        assert take() is own
    handle = 7
    assert take() is not eager
