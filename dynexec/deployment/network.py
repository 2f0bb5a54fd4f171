"""A network as one module, and how to build another like it."""

import copy
import json
import reprlib

import torch

from dynexec.convert import convert, recall
from dynexec.deployment.files import are_plain
from dynexec.models import create_model
from dynexec.models.checkpoints import mismatches
from dynexec.nn import DynamicNetwork, RoutedNetwork
from dynexec.nn.residual import count_blocks, dynamic_blocks


def join(model, policy):
    """Combine a model and the policy that decides for it in one module: a RoutedNetwork or a DynamicNetwork."""
    if isinstance(model, RoutedNetwork) or (isinstance(model, DynamicNetwork) and policy is None):
        return model
    return DynamicNetwork(model.backbone if isinstance(model, DynamicNetwork) else model, policy)


def num_columns(net):
    """Return L, or None if decisions are of another kind."""
    return None if isinstance(net, RoutedNetwork) else count_blocks(net.backbone)


def describe(net):
    """Return the manifest's entries ``network``, ``conversion`` and ``num_blocks``."""
    name, arguments = getattr(net, "created_by", (None, None))
    conversion = None if isinstance(net, RoutedNetwork) else recall(net.backbone)
    return {"network": _recipe(net, name, arguments), "conversion": conversion, "num_blocks": num_columns(net)}


def _recipe(net, name, arguments):
    """Return name and arguments as they come back from a file, or None if they do not build such a network."""
    try:
        recipe = json.loads(json.dumps({"name": name, "arguments": arguments}))
        state = outline(recipe)
    except (TypeError, ValueError):  # no name, or an argument that is an object
        return None
    fits = are_plain(recipe["arguments"]) and not mismatches("network", state, net.state_dict())
    return recipe if fits else None


def outline(recipe):
    """Return the state that ``create_model`` would give a network, on the meta device: names and shapes."""
    with torch.device("meta"):
        return create_model(recipe["name"], **recipe["arguments"]).state_dict()


def build(manifest, path, state, model, policy):
    """Build the network of the manifest in ``path``, with the weights ``state``, on the CPU.

    ``model`` and ``policy``, the user's, are copied; None: built as the manifest says.
    """
    if model is None:
        net = _create(manifest, path, state)
    else:
        net = _adopt(manifest, path, copy.deepcopy(model), copy.deepcopy(policy))
    if problems := mismatches("network", net.state_dict(), state):
        raise ValueError("\n".join([f"model is not the network of {path}:", *problems]))
    if num_columns(net) != manifest.num_blocks:
        raise ValueError(f"model has {num_columns(net)} dynamic blocks, but that of {path} had {manifest.num_blocks}")
    net.load_state_dict(state, strict=False, assign=True)  # its dtypes, too; counters of batches may be missing
    return net.eval()


def _create(manifest, path, state):
    recipe = manifest.network
    if recipe is None:
        raise ValueError(f"model must be given: the network of {path} is not one that create_model builds by name")
    try:
        problems = mismatches("network", outline(recipe), state)  # before there is memory for what may be anything
    except Exception as error:  # of a constructor, on what may be anything
        raise ValueError(f"{path}: create_model cannot build its network {reprlib.repr(recipe)}: {error}") from error
    if problems:
        raise ValueError("\n".join([f"{path}: its network {recipe['name']} has other weights:", *problems]))
    return create_model(recipe["name"], **recipe["arguments"])


def _adopt(manifest, path, model, policy):
    if isinstance(model, RoutedNetwork) and policy is not None:
        raise ValueError("policy must be None for a network that has its own")
    if isinstance(model, RoutedNetwork) or any(block.placement for block in dynamic_blocks(model)):
        return join(model, policy)
    if manifest.conversion is None:
        raise ValueError(f"model has no dynamic blocks, and {path} does not say which: convert it as it was when saved")
    try:
        convert(model, **manifest.conversion)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: model cannot be converted as its conversion says: {error}") from error
    return join(model, policy)
