"""Files of pickled modules, read without running any of their code: only tensors come out of them as what they were."""

import collections
import pickle
import warnings
from types import SimpleNamespace

import torch
from torch import nn

# What may be called: it makes containers and tensors. Of anything else there is only a stand-in.
_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_ALLOWED = {("torch._utils", name): getattr(torch._utils, name) for name in _REBUILDERS}
_ALLOWED |= {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch.nn.parameter", "Parameter"): nn.Parameter,
    ("builtins", "set"): set,
    ("builtins", "object"): object,
    ("copyreg", "_reconstructor"): lambda kind, base, state: kind.__new__(kind),
}


class Inert:
    """Stands for an object of a class that is not loaded: it has the object's attributes and does nothing."""

    def __new__(cls, *arguments, **keywords):
        return super().__new__(cls)

    def __init__(self, *arguments, **keywords):
        pass

    def __call__(self, *arguments, **keywords):
        return Inert()

    def __setitem__(self, key, value):
        pass

    def extend(self, items):
        pass

    append = extend


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name.endswith("Storage"):
            return super().find_class(module, name)
        return type(name, (Inert,), {"__module__": module})


def load_inert(path):
    """What ``torch.load`` gives for a file, with :class:`Inert` objects in place of all but containers and tensors."""

    def load(file, **arguments):
        return _Unpickler(file, **arguments).load()

    module = SimpleNamespace(__name__="pickle", Unpickler=_Unpickler, load=load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the source code of the classes
        return torch.load(path, map_location="cpu", pickle_module=module, weights_only=False, encoding="latin1")


def state_of(module):
    """Parameters and buffers by name, of an ``nn.Module`` or of what :class:`Inert` made of a pickled one; or None."""
    if isinstance(module, nn.Module):
        return module.state_dict()
    if not isinstance(module, Inert) or not isinstance(getattr(module, "_parameters", None), dict):
        return None
    state = {}
    for tensors in (module._parameters, getattr(module, "_buffers", {})):
        state |= {name: value for name, value in tensors.items() if value is not None}
    for name, child in getattr(module, "_modules", {}).items():
        state |= {f"{name}.{key}": value for key, value in (state_of(child) or {}).items()}
    return {name: getattr(value, "data", value) for name, value in state.items()}
