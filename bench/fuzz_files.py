"""Damaged and hostile files for bench/fuzz.py."""

import io
import json
import os
import zipfile

import torch


def draw(generator, high):
    return int(torch.randint(high, (), generator=generator))


def pick(generator, options):
    return options[draw(generator, len(options))]


def mutate_bytes(content, generator):
    """Some bits the other way round, a part missing at the end or in the middle, a part somewhere else, or noise."""
    content = bytearray(content)
    kind = pick(generator, ("bits", "bits", "end", "middle", "moved", "noise"))
    if kind == "bits":
        for _ in range(1 + draw(generator, 3)):
            content[draw(generator, len(content))] ^= 1 << draw(generator, 8)
        return bytes(content)
    begin = draw(generator, len(content))
    if kind == "end":
        return bytes(content[:begin])
    length = 1 + draw(generator, 64)
    if kind == "middle":
        return bytes(content[:begin] + content[begin + length :])
    if kind == "moved":
        to = draw(generator, len(content))
        content[to : to + length] = content[begin : begin + length]
        return bytes(content)
    return bytes(torch.randint(256, (draw(generator, 4096),), generator=generator, dtype=torch.uint8).tolist())


def junk(generator):
    """A value that is not what a checkpoint's entry should be."""
    return pick(
        generator,
        [
            *(None, True, -1, 10**30, float("nan"), 1e308, "", "text", b"bytes", [], {}, (), [[[]]], {1: 2}, {"a": {}}),
            *(torch.zeros(()), torch.zeros(0), torch.full((2, 3), torch.nan), torch.zeros(3, dtype=torch.complex64)),
            *(torch.zeros(4, 4, device="meta"), torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.bool)),
        ],
    )


def like(x, generator):
    """A tensor of the shape of ``x`` that is of another kind, or has other values."""
    return pick(
        generator,
        [
            lambda: x.to("meta"),
            lambda: x.to_sparse() if x.dim() else x,
            lambda: x.to(torch.complex64),
            lambda: x.bool(),
            lambda: x.double(),
            lambda: x.half(),
            lambda: x.flatten()[:1].squeeze().expand(x.shape),
            lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        ],
    )()


def mutate_state(state, generator):
    """A nested mapping or list with one or two of its values exchanged, missing, added or something else."""
    if isinstance(state, list):
        whole, keys = list(state), list(range(len(state)))
    else:
        whole, keys = dict(state), list(state)
    if not keys:
        return junk(generator)
    key = pick(generator, keys)
    inner = whole[key]
    if isinstance(inner, (dict, list)) and draw(generator, 8):
        whole[key] = mutate_state(inner, generator)
        return whole
    kind = pick(generator, ("junk", "like", "swapped", "missing", "added"))
    if kind == "junk":
        whole[key] = junk(generator)
    elif kind == "like":
        whole[key] = like(inner, generator) if isinstance(inner, torch.Tensor) else junk(generator)
    elif kind == "swapped":
        other = pick(generator, keys)
        whole[key], whole[other] = whole[other], whole[key]
    elif kind == "missing":
        del whole[key]
    elif isinstance(whole, list):
        whole.append(junk(generator))
    else:
        whole[pick(generator, ("extra", 1, "step"))] = junk(generator)
    return whole


def _instructions(folder):
    """Parts of pickles: calls in every way that there is, of functions that leave the file ``effect`` behind."""
    effect = f"{folder}/effect".encode()
    call = b"cposix\nsystem\n", b"(X" + len(b"touch " + effect).to_bytes(4, "little") + b"touch " + effect + b"t"
    make = b"cpathlib\nPath\n", b"(X" + len(effect).to_bytes(4, "little") + effect + b"t"
    opened = b"cio\nopen\n", b"(X" + len(effect).to_bytes(4, "little") + effect + b"X\x01\x00\x00\x00wt"
    text = b"X" + len(b"touch " + effect).to_bytes(4, "little") + b"touch " + effect
    parts = [b"".join(pair) + b"R" for pair in (call, make, opened)]  # REDUCE
    parts += [b"".join(pair) + b"\x81" for pair in (call, make, opened)]  # NEWOBJ
    parts += [b"".join(pair) + b"}\x92" for pair in (call, make)]  # NEWOBJ_EX
    parts += [b"(" + text + b"iposix\nsystem\n", b"(cposix\nsystem\n" + text + b"o"]  # INST, OBJ
    parts += [b"\x8c\x05posix\x8c\x06system\x93(" + text + b"tR"]  # STACK_GLOBAL
    parts += [
        b"cbuiltins\neval\n(X\x05\x00\x00\x001/0  tR",
        b"cbuiltins\ngetattr\n(cos\nenviron\nX\x04\x00\x00\x00copytR",
    ]
    parts += [b"}X\x09\x00\x00\x00__class__cposix\nsystem\nsb", b"ccollections\nOrderedDict\n)R}b"]  # BUILD
    parts += [b"\x82\x01", b"\x83\x01\x00", b"Pname\n", b"]Q", b"(X\x07\x00\x00\x00storageI1\ntQ"]  # EXT, PERSID
    parts += [b"]" * 50 + b"a" * 49, b"]q\x00h\x00a", b"}q\x01K\x01h\x01s", b"(" * 30, b"2", b"0", b"1"]
    parts += [
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x96" + b"\xff" * 7 + b"\x7f",
        b"\x95" + b"\xff" * 8,
        b"\x8b\xff\xff\xff\x7f",
    ]
    parts += [
        b"I" + b"9" * 5000 + b"\n",
        b"F1e999\n",
        b"L1\n",
        b"\x8a\xff" + b"\x7f" * 255,
        b"N",
        b"\x88",
        b")",
        b"}",
        b"]",
    ]
    parts += [b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(K\x03t(K\x01t\x89ccollections\nOrderedDict\n)RtR"]
    parts += [b"ctorch\nFloatStorage\n", b"cnumpy.core.multiarray\n_reconstruct\n(NK\x00tR", b"X\x03\x00\x00\x00net"]
    return parts


def write_pickle(path, folder, generator):
    """A file of pickle instructions, as they are, in torch's zip format or in the one before."""
    parts = _instructions(folder)
    body = b"".join(pick(generator, parts) for _ in range(1 + draw(generator, 6)))
    if draw(generator, 2):  # inside of what a checkpoint is
        body = b"}X\x03\x00\x00\x00net" + body + b"sX\x05\x00\x00\x00agent" + pick(generator, parts) + b"s"
    pickled = b"\x80" + bytes([2 + draw(generator, 3)]) + body + b"."
    kind = draw(generator, 3)
    if kind == 0:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/data/0", bytes(16))
        pickled = file.getvalue()
    elif kind == 1:
        file = io.BytesIO()
        torch.save({}, file, _use_new_zipfile_serialization=False)
        head = file.getvalue()[: file.getvalue().rindex(b"\x80\x02}q\x00.")]
        pickled = head + pickled + b"\x80\x02]."
    with open(path, "wb") as file:
        file.write(pickled)


def acted(folder):
    """Whether something in a hostile file was executed."""
    return os.path.exists(f"{folder}/effect")


def mutate_json(text, generator):
    """A JSON file with some values, names or bytes changed, or something else altogether."""
    kind = draw(generator, 8)
    if kind == 0:
        return mutate_bytes(text.encode(), generator)
    if kind == 1:
        return pick(
            generator,
            [
                *(b"", b"null", b"[]", b"{}", b'"text"', b"1e999", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\x00"),
                *(b'{"version": 1}', b'{"version": 1, "entries": []}', b'{"version": true, "entries": {}}'),
                *(b'{"version": 2, "entries": {}}', b'{"version": 1, "entries": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
            ],
        )
    stored = json.loads(text)
    for _ in range(1 + draw(generator, 4)):
        _change(stored["entries"], generator)
    return json.dumps(stored).encode()


def _change(node, generator):
    """Change one value, or one name, somewhere inside."""
    keys = list(node)
    key = pick(generator, keys)
    if isinstance(node[key], dict) and node[key] and draw(generator, 5):
        return _change(node[key], generator)
    values = [None, True, False, -1, 0, 1, 1.0, 2, 2.0, 32, 10**30, 10**400, 0.0, -1.0, 1e308, 1e-300, float("nan")]
    values += [float("inf"), "", "1", [], {}, [[[]]], {"1": 1}, {"1": 0.1, "01": 0.2}, {"-1": 0.1}, {"9" * 400: 0.1}]
    kind = draw(generator, 4)
    if kind == 0:
        node[pick(generator, ["0", "-1", "1", "2", "01", "3.5", "", "chunk", "x", "9" * 30])] = node.pop(key)
    elif kind == 1 and len(keys) > 1:
        del node[key]
    else:
        node[key] = pick(generator, values)
