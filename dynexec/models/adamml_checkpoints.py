"""Reads what AdaMML's authors published: trained networks, and networks of one modality."""

import torch
from torch import nn

from dynexec.models.adamml_policy import CHANNELS
from dynexec.models.checkpoints import Checkpoint, check_mapping, shorten, without_prefix
from dynexec.models.mobilenet import NUM_FEATURES

PREFIXES = ("policy_net.", "main_net.")


def read_checkpoint(net, checkpoint, given):
    """See :meth:`dynexec.models.adamml.AdaMML.read_official`."""
    state, info = _split(checkpoint, given)
    parts, absent = {}, []
    for part, module, prefix in zip(("policy", "main networks"), (net.policy, net.main_net), PREFIXES):
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if own:
            parts[part] = module, _in_order(own, net.policy.modalities) if module is net.policy else own
        else:
            absent.append(part)
    if not parts:
        return _read_unimodal(net, state, info, given)
    if stray := {key: value for key, value in state.items() if not key.startswith(PREFIXES)}:
        parts["neither"] = nn.Module(), stray  # which has no place for them: they are listed with all else
    return Checkpoint(parts, tuple(absent), [], info)


def _split(checkpoint, given):
    """Return the parameters in a checkpoint without prefixes, and its other entries."""
    if "state_dict" in checkpoint:
        check_mapping(checkpoint["state_dict"], "network", f"{given}['state_dict']", given)
        info = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        return without_prefix(checkpoint["state_dict"]), info
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        check_mapping(checkpoint, "network", given, given)
        return without_prefix(checkpoint), {}
    raise ValueError(
        f"{given} has the entries {shorten(map(repr, checkpoint))}: expected 'state_dict', or parameters by name"
    )


def _read_unimodal(net, state, info, given):
    first = next((name for name in ("conv1.weight", "features.0.0.weight") if name in state), None)
    channels = getattr(state.get(first), "shape", ())[1:2]
    if not channels:
        raise ValueError(
            f"{given} has the parameters {shorten(state)}: expected policy_net.* and main_net.*, or a network of one "
            "modality: conv1.weight, layer1.*, ... or features.0.0.weight, ..."
        )
    for name, module in zip(net.modalities, net.main_net.nets):
        if first in module.state_dict() and CHANNELS[name] == channels[0]:
            others = tuple(other for other in net.modalities if other != name)
            return Checkpoint({name: (module, state)}, ("policy", *others), [], info)
    raise ValueError(
        f"{given} holds a network whose {first} takes {channels[0]} channels, as none of this network's modalities "
        f"does: {', '.join(net.modalities)}"
    )


def _in_order(state, modalities):
    """Return a policy's state with its networks in the order of ``modalities``, which may differ in the published code.

    There they follow the command line, where "rgbdiff" need not stand in the place of "flow".
    """
    firsts = [state.get(f"joint_net.nets.{net}.features.0.0.weight") for net in range(len(modalities))]
    joint = state.get("joint_net.joint.0.weight")
    if any(getattr(value, "ndim", 0) < 2 for value in (*firsts, joint)):
        return state  # what is wrong will be listed
    found, expected = [value.shape[1] for value in firsts], [CHANNELS[name] for name in modalities]
    if sorted(found) != sorted(expected) or joint.shape[1] != len(found) * NUM_FEATURES:
        return state
    place = {str(net): str(expected.index(channels)) for net, channels in enumerate(found)}
    ordered = {}
    for key, value in state.items():
        if key.startswith("joint_net.nets."):
            net, _, rest = key.removeprefix("joint_net.nets.").partition(".")
            key = f"joint_net.nets.{place.get(net, net)}.{rest}"
        ordered[key] = value
    columns = joint.split(NUM_FEATURES, 1)
    ordered["joint_net.joint.0.weight"] = torch.cat([columns[found.index(channels)] for channels in expected], 1)
    return ordered
