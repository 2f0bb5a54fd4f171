"""load, of folders that are damaged, or forged so that every hash fits."""

import json
import os
import pickle
import shutil
from hashlib import sha256

import pytest
import torch
import toys
from hostile import Effect

import dynexec
from dynexec.models import create_model

safetensors = pytest.importorskip("safetensors.torch")
MANIFEST, WEIGHTS, EXAMPLE = "manifest.json", "weights.safetensors", "example.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a network of 4 blocks; not to be changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "net"
    net = create_model("blockdrop_resnet32_cifar10", blocks=(1, 2, 1), widths=(4, 8, 8), num_classes=3)
    dynexec.save(toys.finish(net), folder, torch.randn(3, 3, 16, 16))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "net")


def rewrite(folder, **changes):
    """Change entries of the manifest; its own hash fits again."""
    entries = json.loads((folder / MANIFEST).read_text()) | changes
    del entries["sha256"]
    entries["sha256"] = sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(entries))


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, EXAMPLE])
def test_a_flipped_bit_is_found_wherever_it_is(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for place in torch.linspace(0, len(whole) - 1, 40).long().tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            unchanged = name == MANIFEST and json.loads(damaged) == json.loads(whole)  # a space that is a newline now
        except ValueError:
            unchanged = False
        if not unchanged:
            with pytest.raises(ValueError, match=name):
                dynexec.load(folder)
    for length in (0, 7, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            dynexec.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        dynexec.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, and this version of dynexec reads 1"),
        ({"format": True}, "format True"),
        ({"more": 1}, "must have the entries .*'more'"),
        ({"versions": {"dynexec": 1, "torch": "2"}}, "versions must be"),
        ({"files": {WEIGHTS: "0" * 64, EXAMPLE: "0" * 64, "../x": "0" * 64}}, "of no other file"),
        ({"files": {WEIGHTS: "0" * 64, "../example.safetensors": "0" * 64}}, "of no other file"),
        ({"files": {WEIGHTS: "../weights", EXAMPLE: "0" * 64}}, "files must be the SHA-256"),
        ({"network": {"name": "../blockdrop", "arguments": {}}}, "create_model cannot build"),
        ({"network": {"name": "adamml", "arguments": {"modalities": 3}}}, "create_model cannot build"),
        ({"network": {"name": "adamml", "arguments": []}}, "network must be null, or"),
        ({"network": {"name": "adamml", "arguments": {"policy_size": 2**20 + 1}}}, "numbers up to 1048576"),
        ({"network": {"name": "adamml", "arguments": {"modalities": [[float("nan")]]}}}, "numbers up to 1048576"),
        ({"network": {"name": "adamml", "arguments": {"modalities": [1] * 5000}}}, "4096 at most"),
        ({"network": {"name": "adamml", "arguments": {"modalities": {"rgb": 1}}}}, "network must be null, or"),
        ({"network": {"name": "blockdrop_resnet110_cifar10", "arguments": {}}}, "other weights"),
        ({"network": None}, "model must be given"),
        ({"conversion": {"match": [], "batch_norm": "all", "fine_tune": None}}, "conversion must be"),
        ({"num_blocks": 7}, "has 4 dynamic blocks, but that of .*manifest.json had 7"),
        ({"num_blocks": "4"}, "num_blocks must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"batch_size": 2**16 + 1}, "batch_size must be a positive number up to 65536"),
        ({"batch_size": 10**30}, "batch_size must be a positive number up to 65536"),
        ({"options": {"dtype": "load", "executor": None, "winograd": True, "batch_invariant": False}}, "dtype"),
        ({"options": {"dtype": None, "executor": "quick", "winograd": True, "batch_invariant": False}}, "executor"),
        ({"options": {"dtype": None, "executor": None, "winograd": 1, "batch_invariant": False}}, "options must be"),
    ],
)
def test_manifests_are_checked_entry_by_entry(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        dynexec.load(folder)
    assert MANIFEST in str(caught.value)


def test_a_manifest_that_was_edited_says_so(folder):
    entries = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(entries | {"batch_size": 5}))
    with pytest.raises(ValueError, match="was changed: its content does not match the sha256 that it holds"):
        dynexec.load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"format": NaN}', "\ud800", '{"format": 1}']
)
def test_manifests_that_are_none(folder, text):
    (folder / MANIFEST).write_bytes(text.encode("utf-16" if text == "{" else "utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=MANIFEST):
        dynexec.load(folder)


def test_nothing_is_unpickled(folder):
    data = pickle.dumps(Effect())
    Effect.happened = False
    for name in (WEIGHTS, EXAMPLE):
        (folder / name).write_bytes(data)
    rewrite(folder, files=dict.fromkeys((WEIGHTS, EXAMPLE), sha256(data).hexdigest()))
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a safetensors file"):
        dynexec.load(folder)
    assert not Effect.happened


def forge(folder, tensors):
    """Write another example, with hashes that fit."""
    content = safetensors.save(tensors)
    (folder / EXAMPLE).write_bytes(content)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    rewrite(folder, files=files | {EXAMPLE: sha256(content).hexdigest()})


def test_an_example_without_its_tensors(folder):
    tensors = safetensors.load((folder / EXAMPLE).read_bytes())
    for missing in ("inputs.", "decisions.0", "outputs.1.0", "sure"):
        forge(folder, {name: value for name, value in tensors.items() if name != missing})
        with pytest.raises(ValueError, match=f"{EXAMPLE} is not an example"):
            dynexec.load(folder)
    for scalar in (torch.tensor(1.0), torch.zeros(0, 3, 16, 16)):
        forge(folder, tensors | {"inputs.": scalar})
        with pytest.raises(ValueError, match=f"{EXAMPLE} is not an example"):
            dynexec.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inputs.", lambda x: x[0], "cannot be run on these inputs and decisions"),
        ("inputs.", lambda x: x > 0, "cannot be run on these inputs and decisions"),
        ("inputs.", lambda x: x[:, :2].contiguous(), "cannot be run on these inputs and decisions"),
        ("decisions.1", lambda x: x[:, :-1].contiguous(), "cannot be run on these inputs and decisions"),
        ("decisions.0", lambda x: x.long(), "cannot be run on these inputs and decisions"),
        ("decided", lambda x: x.t().contiguous(), "what the policy decides differ"),
        ("sure", lambda x: x[0].clone(), "what the policy decides differ"),
    ],
)
def test_an_example_of_something_else(folder, name, change, message):
    tensors = safetensors.load((folder / EXAMPLE).read_bytes())
    forge(folder, tensors | {name: change(tensors[name])})
    with pytest.raises(ValueError, match=f"{EXAMPLE} is not of the network of {WEIGHTS}: .*{message}"):
        dynexec.load(folder)


def test_what_says_where_the_policy_is_sure_may_have_another_dtype(folder):
    tensors = safetensors.load((folder / EXAMPLE).read_bytes())
    forge(folder, tensors | {"sure": tensors["sure"].float()})
    dynexec.load(folder)


def test_what_is_no_file(folder):
    for name in (MANIFEST, WEIGHTS, EXAMPLE):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(os.devnull)  # a pipe or /dev/zero would never end
        with pytest.raises(ValueError, match=f"{name} is not a file"):
            dynexec.load(folder)
        path.unlink()
        with pytest.raises(ValueError, match=f"^[^:]*{name} cannot be read"):
            dynexec.load(folder)
        path.write_bytes(content)


def test_a_conversion_that_does_not_fit(tmp_path):
    model, twin, _ = toys.converted()
    dynexec.save(model, tmp_path / "net", toys.images(2))
    conversion = json.loads((tmp_path / "net" / MANIFEST).read_text())["conversion"]
    for changes in ({"match": ["nothing"]}, {"batch_norm": "some"}, {"fine_tune": "something"}):
        rewrite(tmp_path / "net", conversion=conversion | changes)
        with pytest.raises(ValueError, match=f"{MANIFEST}: model cannot be converted"):
            dynexec.load(tmp_path / "net", twin)


def test_an_example_that_is_not_finite_names_the_file(tmp_path):
    model, twin, _ = toys.converted()
    dynexec.save(model, tmp_path / "net", toys.images(2))
    tensors = safetensors.load((tmp_path / "net" / EXAMPLE).read_bytes())
    forge(tmp_path / "net", tensors | {"inputs.": torch.full_like(tensors["inputs."], torch.nan)})
    with pytest.raises(ValueError, match=rf"{EXAMPLE} is not of the network of {WEIGHTS}: its inputs hold NaN"):
        dynexec.load(tmp_path / "net", twin)


def test_what_cannot_be_frozen_names_the_folder(tmp_path):
    model, twin, _ = toys.converted()
    dynexec.save(model, tmp_path / "net", toys.images(2), executor="compact")
    twin.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(RuntimeError, match=rf"{tmp_path / 'net'}: the network cannot be frozen here"):
        dynexec.load(tmp_path / "net", twin)
