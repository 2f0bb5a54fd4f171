"""What bench/fuzz.py tries. ``TARGETS[name](folder)`` gives ``attempt(generator)``: "error", "right", or an exception.

Every target knows by itself whether an input is good: one that is must give the right answer, compared with that of an
independent computation, and one that is not an error of ours: a TypeError, ValueError, IndexError or RuntimeError
whose text begins by naming the argument.
"""

import numpy as np
import torch
from fuzz_files import acted, draw, mutate_bytes, mutate_json, mutate_state, pick, write_pickle
from fuzz_folders import saved_folders
from torch import nn

import dynexec
from dynexec import Route
from dynexec.executors import backends
from dynexec.executors.proof import relative_error
from dynexec.models import blockdrop_resnet, load_official
from dynexec.models.spottune import spottune_resnet26
from dynexec.models.training import train_dense

TOLERANCE = 1e-5


def refused(function, names):
    """Whether ``function()`` raises an error of ours about one of ``names``; else its result. Others fail."""
    try:
        return False, function()
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if not str(error).startswith(names):
            raise AssertionError(f"not an error of ours: {type(error).__name__}: {error}") from error
        return True, None


def blockdrop():
    torch.manual_seed(0)
    return blockdrop_resnet((1, 2, 1), (4, 4, 8), num_classes=3).eval()


def equal_states(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


# Files


def official_checkpoints(folder):
    """Published checkpoints: damaged bytes, tensors that are not what they were, hostile pickles.

    What loads has all of a part's values as they are in the file. One in torch's zip format has checksums: it is
    refused, or loads as it was written. One of PyTorch 0.3 has none: what loads may hold other numbers. In no case may
    its code run, nor may a network be loaded by half.
    """
    torch.manual_seed(1)
    spottune = spottune_resnet26(num_classes=3, blocks=(1, 1), widths=(4, 8), stem_width=4)

    def split_blockdrop(net):
        parts = {"resnet": net.backbone.state_dict(), "agent": net.policy.state_dict()}
        return {key: {name: value.clone() for name, value in part.items()} for key, part in parts.items()} | {
            "epoch": 3
        }

    parts = [(blockdrop(), split_blockdrop), (spottune, lambda net: {"net": net.backbone, "agent": net.policy.network})]
    files = []
    for net, split in parts:
        for zipped in (True, False):
            path = f"{folder}/whole"
            torch.save(split(net), path, _use_new_zipfile_serialization=zipped)
            files.append((net, {k: v.clone() for k, v in net.state_dict().items()}, zipped, open(path, "rb").read()))

    def attempt(generator):
        net, state, zipped, content = pick(generator, files)
        path, kind = f"{folder}/checkpoint", pick(generator, ("bytes", "bytes", "state", "pickle"))
        if kind == "bytes":
            with open(path, "wb") as file:
                file.write(mutate_bytes(content, generator))
        elif kind == "state":
            net, state, zipped = files[0][:3]
            net.load_state_dict(state)
            written = mutate_state(split_blockdrop(net), generator)
            torch.save(written, path)
            state = {f"{part}.{name}": value for key, part in (("resnet", "backbone"), ("agent", "policy"))
                     if isinstance(written.get(key), dict) for name, value in written[key].items()}  # fmt: skip
        else:
            write_pickle(path, folder, generator)
        for value in net.state_dict().values():
            value.fill_(0)
        wrong, report = refused(lambda: load_official(net, path), ("source",))
        assert not acted(folder), "code from the file was executed"
        loaded = net.state_dict()
        if wrong:
            assert not any(value.any() for value in loaded.values()), "refused, but loaded by half"
            return "error"
        assert kind != "pickle", "loaded what no network is"
        assert sorted((*report.loaded, *report.absent)) == ["backbone", "policy"] and report.loaded
        for name, value in loaded.items():
            if name.split(".")[0] in report.absent:
                assert not value.any(), f"said to be absent, but loaded: {name}"
            elif not zipped:  # damage is of 64 bytes at most
                assert value.any() or value.numel() <= 16 or not state[name].any(), f"not loaded: {name}"
            elif name in state:
                assert torch.equal(value, state[name].to(value.dtype)), f"loaded other numbers: {name}"
            else:
                assert name.endswith("num_batches_tracked"), f"loaded though it is missing: {name}"
        return "right"

    return attempt


def training_checkpoints(folder):
    """Files of a training that goes on: damaged bytes, and entries that are something else.

    Damaged files are refused, or the training ends as if nothing had happened. On a refusal network and file are as
    they were.
    """
    data = torch.Generator().manual_seed(7)
    images, labels = torch.randn(4, 3, 8, 8, generator=data), torch.randint(3, (4,), generator=data)

    class Stop(Exception):
        pass

    def stop(_):
        raise Stop

    def train(net, **options):
        torch.manual_seed(3)
        return train_dense(net, images, labels, epochs=2, batch_size=4, generator=torch.manual_seed(3), **options)

    path, expected = f"{folder}/training.pt", blockdrop()
    train(expected)
    try:
        train(blockdrop(), checkpoint=path, on_epoch=stop)
    except Stop:
        content = open(path, "rb").read()
    state = torch.load(path, weights_only=True)

    def attempt(generator):
        damaged = draw(generator, 2) == 0
        if damaged:
            with open(path, "wb") as file:
                file.write(mutate_bytes(content, generator))
        elif draw(generator, 4) == 0:
            write_pickle(path, folder, generator)
        else:
            torch.save(mutate_state(state, generator), path)
        net, written = blockdrop(), open(path, "rb").read()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        wrong, _ = refused(lambda: train(net, checkpoint=path), ("checkpoint",))
        assert not acted(folder), "code from the file was executed"
        if wrong:
            assert equal_states(net.state_dict(), before), "refused, but loaded by half"
            assert open(path, "rb").read() == written, "refused, but changed"
        elif damaged:
            assert equal_states(net.state_dict(), expected.state_dict()), "went on otherwise"
        return "error" if wrong else "right"

    return attempt


def cost_caches(folder):
    """Cost caches: whatever such a file holds, ``freeze`` gives a network with right outputs, and no error."""
    torch.manual_seed(0)
    model = blockdrop().backbone
    images = torch.randn(2, 3, 8, 8)
    contents, engine_missing = {}, backends.engine_missing
    path = f"{folder}/costs.json"

    def freeze(by_layer):
        backends.engine_missing = (lambda: "by layer") if by_layer else engine_missing
        return dynexec.freeze(model, images, cost_cache=path)

    for by_layer in (False, True):
        freeze(by_layer)
        contents[by_layer] = open(path).read()

    def attempt(generator):
        by_layer = draw(generator, 2) == 0
        with open(path, "wb") as file:
            file.write(mutate_json(contents[by_layer], generator))
        frozen = freeze(by_layer)
        frozen.explain()
        for n in (1, 3):
            x, decisions = torch.randn(n, 3, 8, 8), torch.rand(n, 4) < 0.5
            with torch.no_grad(), dynexec.decide(decisions):
                assert relative_error(frozen(x, decisions), model(x)) < TOLERANCE
        return "right"

    return attempt


# Tensors

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.complex64]


class Subclass(torch.Tensor):
    pass


def other_tensor(x, generator):
    """``x``, or something like it, and whether it has its values, in a dense tensor of its shape and dtype."""
    same = {
        "itself": lambda: x,
        "columns": lambda: x.t().contiguous().t() if x.dim() == 2 else x,
        "gaps": lambda: torch.stack((x, x), -1)[..., 0],
        "subclass": lambda: x.as_subclass(Subclass),
        "parameter": lambda: nn.Parameter(x, requires_grad=False),
        "negated": lambda: torch._neg_view(-x) if x.is_floating_point() else x,
        "offset": lambda: torch.cat((x, x))[len(x) :],
    }
    other = {
        "dtype": lambda: x.to(pick(generator, [dtype for dtype in DTYPES if dtype != x.dtype])),
        "quantized": lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        "shape": lambda: x[..., :-1],
        "rows": lambda: torch.cat((x, x)),
        "dimension": lambda: x.unsqueeze(draw(generator, x.dim() + 1)),
        "scalar": lambda: x.flatten()[:1].sum().to(x.dtype),
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.to_sparse(),
        "rows of lists": lambda: x.tolist(),
        "array": lambda: x.numpy(),
        "nested": lambda: torch.nested.nested_tensor([x, x]),
        "jagged": lambda: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        "nothing": lambda: pick(generator, ("", object(), 1, b"\x00", float("nan"), {}, np.float32(1))),
    }
    options = same if draw(generator, 3) == 0 else other
    name = pick(generator, sorted(options))
    return options[name](), options is same


def decision_tensors(folder):
    """Decisions given to a frozen network, a converted one and a model."""
    model = blockdrop()
    frozen = dynexec.freeze(model, torch.randn(2, 3, 8, 8), cost_cache=f"{folder}/costs.json")

    def converted(x, decisions):
        with dynexec.decide(decisions):
            return model.backbone(x)

    takers = [frozen, model, converted]

    def attempt(generator):
        n = 1 + draw(generator, 4)
        x = torch.randn(n, 3, 8, 8)
        decisions = torch.rand(n, 4) < 0.5
        decisions = decisions[0] if draw(generator, 4) == 0 else decisions
        if draw(generator, 8) == 0:  # True as other bytes than 1
            decisions = (decisions.to(torch.uint8) * (1 + draw(generator, 255))).view(torch.bool)
        given, good = other_tensor(decisions, generator)
        if not good and given is not None and isinstance(given, torch.Tensor) and given.dtype == torch.bool:
            good = _is_dense(given) and tuple(given.shape) in ((n, 4), (4,))
            decisions = given if good else decisions
        with torch.no_grad():
            wrong, y = refused(lambda: pick(generator, takers)(x, given), ("decisions",))
            assert wrong != good, f"{'refused' if wrong else 'taken'}: {given!r}"
            if not wrong:
                rows = (decisions != False).expand(n, 4)  # noqa: E712 - bytes other than 0 and 1 become 1
                expected = torch.cat([converted(x[i : i + 1], rows[i : i + 1].clone()) for i in range(n)])
                assert relative_error(y.as_subclass(torch.Tensor), expected) < TOLERANCE
        return "error" if wrong else "right"

    return attempt


def _is_dense(x):
    return not x.is_nested and x.layout == torch.strided and x.device.type == "cpu"


def image_tensors(folder):
    """Images given to a frozen network: of sizes that its two segments can halve, and others."""
    model = blockdrop().backbone
    frozen = dynexec.freeze(model, torch.randn(2, 3, 8, 8), cost_cache=f"{folder}/costs.json")

    def attempt(generator):
        n, h, w = draw(generator, 4), 4 * draw(generator, 5), 4 * draw(generator, 5)
        x, decisions = torch.randn(n, 3, h, w), torch.rand(4) < 0.5
        given, _ = other_tensor(x, generator)
        good = isinstance(given, torch.Tensor) and _is_dense(given) and given.is_floating_point()
        good = good and given.dim() == 4 and not (given.shape[2] % 4 or given.shape[3] % 4)
        if good:
            with torch.no_grad(), dynexec.decide(decisions):
                good, expected = does_not_raise(lambda: model(given.as_subclass(torch.Tensor).float()))
        wrong, y = refused(lambda: frozen(given, decisions), ("x ",))
        assert wrong != good, f"{'refused' if wrong else 'taken'}: {getattr(given, 'shape', given)}"
        if not wrong:
            assert relative_error(y.as_subclass(torch.Tensor), expected) < TOLERANCE
        return "error" if wrong else "right"

    return attempt


def does_not_raise(function):
    """Whether ``function()`` raises nothing, and its result."""
    try:
        return True, function()
    except (RuntimeError, ValueError):
        return False, None


def routes(folder):
    """Decisions among several choices, given to ``Route.from_decisions``."""

    def attempt(generator):
        n, blocks, choices = draw(generator, 9), 1 + draw(generator, 4), 2 + draw(generator, 3)
        dtype = pick(generator, [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
        decisions = torch.randint(2 if dtype == torch.bool else choices, (n, blocks)).to(dtype)
        if n and dtype != torch.bool and draw(generator, 3) == 0:
            decisions[draw(generator, n), 0] = pick(generator, (-1, choices, 127))
        given, _ = other_tensor(decisions, generator) if n else (decisions, True)
        good = isinstance(given, torch.Tensor) and _is_dense(given) and given.dim() == 2 and not given.is_quantized
        good = good and not (given.is_floating_point() or given.is_complex())
        good = good and (given.dtype != torch.bool or choices == 2)
        good = good and bool(((given.long() >= 0) & (given.long() < choices)).all())
        wrong, route = refused(lambda: Route.from_decisions(given, choices=choices), ("decisions", "choices"))
        assert wrong != good, f"{'refused' if wrong else 'taken'}: {given!r}"
        if not wrong:
            columns = given.t().tolist()
            for block, choice in ((b, c) for b in range(len(columns)) for c in range(choices)):
                expected = [n for n, value in enumerate(columns[block]) if value == choice]
                assert route.group(block, choice).tolist() == expected
        return "error" if wrong else "right"

    return attempt


TARGETS = {
    "checkpoints": official_checkpoints,
    "trainings": training_checkpoints,
    "caches": cost_caches,
    "folders": saved_folders,
    "decisions": decision_tensors,
    "images": image_tensors,
    "routes": routes,
}
