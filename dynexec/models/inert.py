"""Reads files of pickled modules without running any of their code: returns tensors, and stand-ins for all else.

Neither ``torch.load`` nor the classes and functions that a file names are used. Both of torch's formats are read, as
far as parameters require: pickles of containers, numbers, strings and tensors, and the tensors' values.
"""

import collections
import pickle
import struct
import sys
import zipfile

import torch
from torch import nn

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MOST_MODULES = 10_000  # of a file


class Inert:
    """Stand-in for an object whose class is not loaded: it has the object's ``attributes``, and does nothing."""

    def __init__(self):
        self.attributes = {}

    def __call__(self, *arguments, **keywords):
        return Inert()

    def __setitem__(self, key, value):
        pass

    def extend(self, items):
        pass

    append = add = extend


class _Name:
    """Stand-in for a class or function; calls return data for a few that only build data, otherwise an Inert."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, *arguments, **keywords):
        if self.module == "torch._utils" and self.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, size, stride = arguments[:4]
            return storage.as_strided(size, stride, offset)  # which checks that it stays inside
        if self.name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter") and arguments:
            return arguments[0]
        if (self.module, self.name) == ("collections", "OrderedDict"):
            return collections.OrderedDict(*arguments)
        return Inert()


class _Unpickler(pickle._Unpickler):
    """The Python unpickler, with every step replaced that could reach an object's own code."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, load_storage):
        super().__init__(file, encoding="latin1")  # Python 2 wrote its strings as bytes
        self.load_storage = load_storage

    def find_class(self, module, name):
        return _Name(module, name)

    def persistent_load(self, identity):
        kind, what, *rest = identity
        return self.load_storage(_DTYPES[what.name], *rest) if kind == "storage" else what

    def get_extension(self, code):
        raise pickle.UnpicklingError("extension codes are not read")

    def _new(self):
        arguments = self.stack.pop()
        self.stack.append(self.stack.pop()(*arguments))

    def _new_with_keywords(self):
        self.stack.pop()
        self._new()

    def _build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert) and isinstance(state, dict):
            self.stack[-1].attributes.update(state)

    dispatch[pickle.NEWOBJ[0]] = _new
    dispatch[pickle.NEWOBJ_EX[0]] = _new_with_keywords
    dispatch[pickle.BUILD[0]] = _build


def load_inert(path):
    """Read a file like ``torch.load``, with :class:`Inert` objects in place of all but containers and tensors.

    The exception raised for a damaged file depends on where the damage is.
    """
    with open(path, "rb") as file:
        return _load_zip(file) if zipfile.is_zipfile(file) else _load_stream(file)


def _load_zip(file):
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries are not read")
        (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        folder, found = pickled.removesuffix("data.pkl"), {}
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
            raise ValueError("its bytes are in another order than this machine's")

        def load_storage(dtype, key, location, count, *_):
            if key not in found:
                data = bytearray(archive.read(f"{folder}data/{key}"))
                found[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return found[key].view(dtype)

        with archive.open(pickled) as entry:
            return _Unpickler(entry, load_storage).load()


def _load_stream(file):
    size = file.seek(0, 2)
    file.seek(0)
    found = {}

    def load_storage(dtype, key, location, count, view=None, *_):
        if view is not None:
            raise ValueError("parts of storages are not read")
        if key not in found:
            if not 0 <= count * dtype.itemsize <= size:
                raise ValueError("a storage is larger than the file")
            found[key] = torch.zeros(count, dtype=dtype)
        return found[key]

    def load():
        return _Unpickler(file, load_storage).load()

    if load() != _MAGIC:
        raise ValueError("it does not begin as torch's files do")
    load(), load()  # version of the format, and the machine that wrote it
    result = load()
    for key in load():
        (count,) = struct.unpack("<q", file.read(8))
        values = found[key]
        if count != values.numel():
            raise ValueError("a storage has another size than its tensors")
        if count:
            data = bytearray(file.read(count * values.dtype.itemsize))
            values.copy_(torch.frombuffer(data, dtype=values.dtype))
    return result


def state_of(module):
    """Return parameters and buffers by name, of an ``nn.Module`` or of the :class:`Inert` of a pickled one; else None.

    Raises
    ------
    ValueError
        If the pickled module contains itself, or is not built like a module.
    """
    if isinstance(module, nn.Module):
        return module.state_dict()
    if not isinstance(module, Inert) or "_parameters" not in module.attributes:
        return None
    state, waiting, visits = {}, [("", module)], 0
    while waiting:
        prefix, module = waiting.pop()
        visits += 1
        if visits > _MOST_MODULES:
            raise ValueError(f"a pickled module must not hold itself, nor {_MOST_MODULES} others")
        for kind in ("_parameters", "_buffers", "_modules"):
            entries = module.attributes.get(kind, {}) if isinstance(module, Inert) else {}
            if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
                raise ValueError(f"a pickled module must have names in its {kind}")
            for name, value in entries.items():
                if value is None:
                    continue
                if kind == "_modules":
                    waiting.append((f"{prefix}{name}.", value))
                else:
                    state[prefix + name] = value
    return state
