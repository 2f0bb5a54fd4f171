"""Dtypes that meet in the systems: under torch.autocast, by the rules of a CPU and of a GPU, and of soft decisions."""

from contextlib import nullcontext

import adamml_cases
import arnet_cases
import pytest
import test_adashare
import test_blockdrop
import test_feature_sharing
import test_spottune
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dynexec.executors.proof import relative_error
from dynexec.policy import gumbel_softmax


class LikeCuda(TorchFunctionMode):
    """On a GPU autocast gives float32 for some more functions, and none promotes the arguments of index_copy."""

    wide = {F.softmax, F.log_softmax, F.cross_entropy}
    wide |= {getattr(torch.Tensor, name) for name in ("softmax", "log_softmax", "log", "exp", "pow", "sum", "cumsum")}
    strict = {torch.Tensor.index_copy, torch.Tensor.index_add}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.wide and torch.is_autocast_enabled("cpu"):
            narrow = torch.get_autocast_dtype("cpu")
            args = [x.float() if isinstance(x, torch.Tensor) and x.dtype == narrow else x for x in args]
        with torch.autocast("cpu", enabled=False) if function in self.strict else nullcontext():
            return function(*args, **(kwargs or {}))


def blockdrop():
    net, shape = test_blockdrop.cifar_type()
    return net, torch.randn(3, *shape), torch.rand(3, 5) < 0.5, net.policy


def spottune():
    net = test_spottune.small()
    return net, torch.randn(3, 3, 24, 40), torch.rand(3, 5) < 0.5, net.policy.sample_soft


def adashare():
    net = test_adashare.make(instance_policy=True)

    def draw(images):
        return gumbel_softmax(net.policy(images), 5.0, hard=True)[..., 0]

    return net, torch.randn(3, 3, 33, 41), torch.rand(3, 3, 7) < 0.5, draw


def arnet(mode):
    net = arnet_cases.small_net(mode)
    decisions = torch.randint(arnet_cases.ACTIONS, (3, arnet_cases.FRAMES))
    return net, arnet_cases.clips(3), decisions, lambda frames: net.policy.relax(frames, 5.0)


def adamml(case):
    net = adamml_cases.make(case)
    inputs = adamml_cases.inputs_for(net)

    def draw(inputs):
        return gumbel_softmax(net.policy(inputs), 5.0, hard=True)[..., 1]

    return net, inputs, adamml_cases.draw(net, inputs), draw


def feature_sharing():
    return test_feature_sharing.network()[0], torch.randn(3, 3, 16, 16), torch.rand(3, 4) < 0.5, None


SYSTEMS = {
    "BlockDrop": blockdrop,
    "SpotTune": spottune,
    "AdaShare": adashare,
    "AR-Net, exact": lambda: arnet("exact"),
    "AR-Net, cheap": lambda: arnet("cheap"),
    "AdaMML": lambda: adamml("one frame"),
    "AdaMML, fixed weights": lambda: adamml("flow looks at flow"),
    "feature sharing": feature_sharing,
}


@pytest.mark.parametrize("mode", [nullcontext, LikeCuda])
@pytest.mark.parametrize("name", SYSTEMS)
def test_output_and_gradients(name, mode):
    net, inputs, decisions, draw = SYSTEMS[name]()

    def check(decide, **dtype):
        net.zero_grad()
        with mode(), torch.autocast("cpu", torch.bfloat16):
            given = decide()
            output, taken = net(inputs, return_decisions=True, **given)
        outputs = output if isinstance(output, list) else [output]
        sum(y.float().square().sum() for y in outputs).backward()
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients) and any(map(torch.any, gradients))
        with torch.no_grad():
            expected = net(inputs, **{key: value.detach() for key, value in given.items()} or {"decisions": taken})
        expected = expected if isinstance(expected, list) else [expected]
        assert relative_error([y.detach() for y in outputs], expected) < 0.1

    check(lambda: {"decisions": decisions})
    check(dict)
    if draw is not None:
        check(lambda: {"soft_decisions": draw(inputs)})
        assert any(parameter.grad.any() for parameter in net.policy.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "feature sharing"])
def test_soft_decisions_leave_the_output_its_dtype(name):
    net, inputs, _, draw = SYSTEMS[name]()
    with torch.no_grad():
        weights = draw(inputs)
        expected = net(inputs, soft_decisions=weights)
        for dtype, most in ((torch.float64, 1e-5), (torch.bfloat16, 1e-2)):
            output = net(inputs, soft_decisions=weights.to(dtype))
            assert [y.dtype for y in output] == [torch.float32] * len(output)
            assert relative_error(output, expected) < most


@pytest.mark.parametrize("name", SYSTEMS)
def test_inputs_of_another_dtype(name):
    """Autocast converts them; without it they are refused, by torch in BlockDrop and SpotTune."""
    net, inputs, decisions, _ = SYSTEMS[name]()
    narrow = {key: x.bfloat16() for key, x in inputs.items()} if isinstance(inputs, dict) else inputs.bfloat16()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            output = net(narrow, decisions)
        assert relative_error(output, net(inputs, decisions)) < 0.1
        with pytest.raises((TypeError, RuntimeError), match="torch.bfloat16|BFloat16"):
            net(narrow, decisions)


def test_meta_inputs_of_another_dtype():
    """There is no autocast on this device to ask for."""
    net, images = adashare()[:2]
    with pytest.raises(TypeError, match="images must be torch.float32, as the parameters are, got torch.float64"):
        net.count_flops(images.double().to("meta"))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name.startswith("AdaMML")])
def test_adamml_adds_logits_up_in_float32_under_autocast(name):
    net, inputs, decisions, _ = SYSTEMS[name]()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = [net(inputs), net(inputs, decisions), net(inputs, torch.zeros_like(decisions))]
        outputs += [net(inputs, soft_decisions=decisions.to(d)) for d in (torch.bfloat16, torch.float32, torch.float64)]
        narrow = {name: value.bfloat16() for name, value in inputs.items()}
        outputs += [net(narrow), net(narrow, decisions), net(narrow, soft_decisions=decisions.float())]
    assert {output.dtype for output in outputs} == {torch.float32}


@pytest.mark.parametrize("mode", arnet_cases.MODES)
def test_actions_of_no_probability_in_float16(mode):
    """The published clamp at 1e-8 is 0 in float16, of which the logarithm has no gradient."""
    net, frames = arnet_cases.small_net(mode), arnet_cases.clips(8)
    with torch.autocast("cpu", torch.float16):
        log_probabilities = net.policy(frames)
    assert log_probabilities.min() > -19
    log_probabilities.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.policy.parameters() if p.grad is not None)
