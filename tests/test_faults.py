"""Interrupts, full disks, damaged caches, memory that is not there, threads: nothing half done, and it goes on."""

import copy
import inspect
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import toys
from engine_programs import needs_engine
from torch.autograd import grad_mode

import dynexec
from dynexec import cli, files
from dynexec.executors.proof import relative_error
from dynexec.models import blockdrop_resnet, load_official
from dynexec.report import page, rows, tables

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5


def converted():
    model = toys.torchvision_style()
    return model, dynexec.convert(model).num_blocks


def right(frozen, model, num_blocks, n=3, size=13):
    x, decisions = toys.images(n, size), torch.rand(n, num_blocks) < 0.5
    return relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < TOLERANCE


def interrupt_at(call, function):
    """Run ``function``, and a KeyboardInterrupt when it has made that many calls; return how many it made.

    Two kinds are not counted: calls into generators, since of one that is being thrown away Python only reports the
    interrupt; and torch's own way out of ``no_grad``, which leaves gradients disabled in the thread if it is
    interrupted before it has done anything.
    """
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        code = frame.f_code
        if event != "call" or code.co_flags & inspect.CO_GENERATOR or code.co_filename == grad_mode.__file__:
            return
        calls += 1
        if calls == call:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def raise_interrupt():
    raise KeyboardInterrupt


def test_freeze_is_interrupted_anywhere(tmp_path, monkeypatch):
    model, num_blocks = converted()
    before = copy.deepcopy(model.state_dict())
    cache = tmp_path / "cache" / "costs.json"

    def freeze():
        return dynexec.freeze(model, toys.images(2), cost_cache=cache)

    freeze()  # the first time imports modules
    cache.unlink()
    calls = interrupt_at(-1, freeze)
    cache.unlink()
    for share in (0.02, 0.15, 0.3, 0.45, 0.6, 0.7):  # measuring makes a few calls more or less
        with pytest.raises(KeyboardInterrupt):
            interrupt_at(int(share * calls), freeze)
        assert os.listdir(tmp_path / "cache") in ([], ["costs.json"])
        cache.unlink(missing_ok=True)  # so that everything is measured again
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: raise_interrupt())
        freeze()
    assert os.listdir(tmp_path / "cache") == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert right(freeze(), model, num_blocks)


@pytest.mark.parametrize("command, function", [("profile", "build"), ("demo", "_run_parts")])
def test_interrupted_commands_end_with_one_line(command, function, monkeypatch, tmp_path, capsys):
    module = pytest.importorskip(f"dynexec.report.{command}")
    monkeypatch.setattr(module, function, lambda *_: raise_interrupt())
    options = {"profile": ["resnet32"], "demo": ["--out", str(tmp_path)]}[command]
    assert cli.main([command, *options]) == 130
    assert capsys.readouterr().err == f"dynexec {command}: interrupted\n"


def a_row(**changed):
    path = ROOT / "bench" / "results"
    return rows.read_rows(sorted(path.glob("*.jsonl"))[0])[0] | changed


WRITES = {
    "row": (lambda path: rows.append_row(path, a_row(draws=1)), lambda path: rows.append_row(path, a_row(draws=2))),
    "page": (lambda path: page.write_html(path, "old", []), lambda path: page.write_html(path, "new", [])),
    "sections": (
        lambda path: page.write_sections(path, []),
        lambda path: page.write_sections(path, [page.Section("")]),
    ),
    "table": (
        lambda path: path.write_text("<!-- generated: x -->\nold\n<!-- end: x -->"),
        lambda path: tables.write_generated(path, "x", "new\n"),
    ),
}


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["interrupt", "full"]
)
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
@pytest.mark.parametrize("what", WRITES)
def test_a_file_is_the_old_or_the_new_one(what, moment, error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    old, new = WRITES[what]
    old(path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    def half(file, *_):
        file.buffer.raw.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(files, "open", lambda *a: HalfWritten(open(*a), half), raising=False)
        else:
            patch.setattr(os, moment, fail)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            new(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file"]
    new(path)
    assert path.read_bytes() != before and os.listdir(tmp_path) == ["file"]


class HalfWritten:
    """A file of which a write fails in the middle."""

    def __init__(self, file, write):
        self.file, self.fail = file, write

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, text):
        self.fail(self.file)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with files.replacing(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit((tmp_path / "pipe").read_text)
        with files.replacing(tmp_path / "pipe") as file:
            file.write("new")
        assert found.result(timeout=60) == "new"
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_cost_cache_that_cannot_be_written(tmp_path, monkeypatch, error):
    model, num_blocks = converted()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    assert right(dynexec.freeze(model, toys.images(2), cost_cache=tmp_path / "costs.json"), model, num_blocks)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{broken", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[1]", "file of something else"),
        ('{"name": "x", "version": 1, "entries": {}}', "file of something else"),
        ('{"version": 0, "entries": {}}', "version is 0, not 1"),
        ('{"version": true, "entries": {}}', "version is True, not 1"),
        ('{"version": 1, "entries": []}', "entries are not named"),
    ],
)
def test_a_foreign_cost_cache_is_ignored_with_one_line(tmp_path, caplog, content, reason):
    model, num_blocks = converted()
    path = tmp_path / "costs.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert right(dynexec.freeze(model, toys.images(2), cost_cache=path), model, num_blocks)
    assert len(caplog.records) == 1 and reason in caplog.text and str(path) in caplog.text
    if "version is" in reason or "entries" in reason:
        assert json.loads(path.read_text())["version"] == 1
    else:  # it may be anybody's, under a name given by mistake
        assert path.read_text() == content and "stays as it is" in caplog.text


def test_a_file_that_cannot_be_read_stays_as_it_is(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError("not yours")

    model, num_blocks = converted()
    path = tmp_path / "costs.json"
    path.write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert right(dynexec.freeze(model, toys.images(2), cost_cache=path), model, num_blocks)
    assert path.read_text() == "{}"


@pytest.mark.parametrize("content", ["{broken", "[1]", ""])
def test_the_users_own_cost_cache_is_written_anew(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "dynexec" / "costs.json"
    path.parent.mkdir()
    path.write_text(content)
    model, num_blocks = converted()
    assert right(dynexec.freeze(model, toys.images(2)), model, num_blocks)
    assert json.loads(path.read_text())["version"] == 1


@pytest.mark.parametrize("entry", [1.0, True, 3, "1", None, {"1": 1}, [1]])
def test_an_entry_that_does_not_fit_is_measured_anew(tmp_path, caplog, entry):
    """Samples at once must be one of the sizes that were tried."""
    model, num_blocks = converted()
    path = tmp_path / "costs.json"
    dynexec.freeze(model, toys.images(4), cost_cache=path)
    stored = json.loads(path.read_text())
    (key,) = [key for key in stored["entries"] if "samples at once" in key]
    stored["entries"][key] = entry
    path.write_text(json.dumps(stored))
    with caplog.at_level(logging.WARNING):
        assert right(dynexec.freeze(model, toys.images(4), cost_cache=path), model, num_blocks)
    assert "measuring anew" in caplog.text
    assert json.loads(path.read_text())["entries"][key] in (1, 2, 4)


_LITTLE_MEMORY = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
samples = int(sys.argv[2])
import test_faults, toys, dynexec
whole = toys.torchvision_style()
model = torch.nn.Sequential(whole.stem, whole.layers)  # no pooling, which has a largest size
num_blocks = dynexec.convert(model).num_blocks
frozen = dynexec.freeze(model, toys.images(2), executor="fused")
assert test_faults.right(frozen, model, num_blocks)
x, decisions = torch.randn(1, 3, 1280, 1280).expand(samples, -1, -1, -1), torch.ones(num_blocks, dtype=torch.bool)
frozen(x[:, :, :8, :8], decisions)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        frozen(x, decisions)
        print("ran")
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, error)
    print(test_faults.right(frozen, model, num_blocks))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(test_faults.right(frozen, model, num_blocks, 1, 200))
"""


@needs_engine
@pytest.mark.parametrize("samples", [1, 32], ids=["workspace", "output"])
def test_no_memory_for(tmp_path, samples):
    command = [sys.executable, "-c", _LITTLE_MEMORY, str(ROOT / "tests"), str(samples)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    first, *others = result.stdout.splitlines()
    assert first.startswith(("MemoryError", "RuntimeError")) and ("alloc" in first or "memory" in first), first
    assert others == ["True", first, "True", "True"]


@pytest.mark.parametrize("executor", [None, "compact", "grouped"])
def test_threads_with_batches_and_image_sizes_of_their_own(executor):
    """Some sizes are new to the network, to several threads at the same time."""
    model, num_blocks = converted()
    frozen = dynexec.freeze(model, toys.images(4), executor=executor)
    cases = []
    for number in range(48):
        n, size = number % 7, (9, 13, 16, 21)[number // 7 % 4]
        x, decisions = toys.images(n, size), torch.rand(n, num_blocks) < 0.5
        cases.append((x, decisions, toys.run(model, x, decisions)))
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda case: frozen(*case[:2]), cases))
    for output, (_, _, expected) in zip(outputs, cases, strict=True):
        assert relative_error(output, expected) < TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex64),
        lambda x: x.to_sparse(),
        lambda x: x.long(),
        lambda x: torch.nested.nested_tensor([x, x]),
    ],
)
def test_a_checkpoint_with_tensors_of_another_kind_is_not_loaded_by_half(change):
    net = blockdrop_resnet((1, 1), (4, 8), num_classes=3)
    before = copy.deepcopy(net.state_dict())
    state = {name: value + 1 for name, value in net.backbone.state_dict().items()}
    state["fc.weight"] = change(state["fc.weight"])
    with pytest.raises(ValueError, match="left as it was:\n  backbone, of another (kind|shape): fc.weight"):
        load_official(net, {"state_dict": state})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_checkpoint_with_another_number_than_was_written(tmp_path):
    net, path = blockdrop_resnet((1, 1), (4, 8), num_classes=3), tmp_path / "checkpoint.pt"
    torch.save({"state_dict": net.backbone.state_dict()}, path)
    content = bytearray(path.read_bytes())
    values = net.backbone.fc.weight.detach().numpy().tobytes()
    content[content.index(values) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: the checksum of its entry '.*' is wrong"):
        load_official(net, path)


@pytest.mark.parametrize("command", ["fuzz.py --seconds 8 --seed 1", "soak.py --calls 300"])
def test_fuzz_and_soak_for_a_short_time(command):
    program, *options = command.split()
    result = subprocess.run([sys.executable, ROOT / "bench" / program, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
