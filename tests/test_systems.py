"""The bench of systems that choose among parts: fair candidates, honest rows, decisions at the published rates."""

import argparse
from dataclasses import replace
from pathlib import Path

import adamml_cases
import pytest
import test_adashare
import test_arnet
import torch
import torch.nn.functional as F

from dynexec import cli, models
from dynexec.measure import Profile
from dynexec.measure.profile import ROUTED_LOSSES
from dynexec.models.adashare_policy import published_policy
from dynexec.report import baselines, bench, systems, systems_experiment
from dynexec.report.catalogue import HEADINGS, model_rows
from dynexec.report.rows import check_row
from dynexec.report.systems import SYSTEMS, System
from dynexec.report.tables import markdown_table


def _draw(make):
    return lambda network, inputs, generator: [make(inputs, generator) for _ in range(systems.DRAWS)]


def _adashare():
    """Task-specific decisions, a policy that costs nothing."""
    draw = _draw(lambda inputs, generator: torch.rand(3, 7, generator=generator) < 0.7)
    return System(
        test_adashare.make, lambda batch: torch.randn(batch, 3, 33, 41), draw, lambda d: d.float(), 33, policy=False
    )


def _arnet():
    def draw(inputs, generator):
        return torch.randint(0, test_arnet.ACTIONS, inputs.shape[:2], generator=generator)

    return System(
        test_arnet.small_net, test_arnet.clips, _draw(draw), lambda d: F.one_hot(d, test_arnet.ACTIONS).float(), 29,
        policy=False, obey=SYSTEMS["arnet_resnet"].obey,
    )  # fmt: skip


def _adamml():
    def draw(inputs, generator):
        return torch.rand(*inputs["rgb"].shape[:2], 2, generator=generator) < 0.6

    def inputs(batch):
        return adamml_cases.inputs_for(adamml_cases.make(), samples=batch)

    return System(adamml_cases.make, inputs, _draw(draw), lambda d: d.float(), 41)


def _feature_sharing():
    tree = [[[0, 1, 2]]] * 12 + [[[0], [1, 2]]] * 3
    return replace(
        SYSTEMS["feature_sharing_8_tasks"],
        build=lambda: models.feature_sharing_vgg16([2, 3, 2], tree=tree, width=4, image_size=32),
        inputs=lambda batch: torch.randn(batch, 3, 32, 32),
        draw=lambda network, inputs, generator: [torch.ones(3).bool()],
        other=lambda network, inputs: torch.arange(3) > 0,
    )


SMALL = {"adashare": _adashare, "arnet": _arnet, "adamml": _adamml}


@pytest.mark.parametrize("name", [*SMALL, "feature_sharing"])
def test_a_row(name):
    system = (SMALL | {"feature_sharing": _feature_sharing})[name]()
    network = systems.build_system(system) if name == "feature_sharing" else system.build()
    libraries = (baselines.DenseEager, baselines.OnnxRuntime) if name == "arnet" else (baselines.DenseEager,)
    (row,) = systems_experiment.run_system(network, system, 2, name=name, libraries=libraries, seconds=0)
    assert check_row(row)["failed"] == [] and row["net"] == name and row["batch"] == 2
    names = {"masked eager", "naive gather", "dynexec", "dense frozen", "dense eager"}
    assert names <= row["milliseconds"].keys() and max(row["max_error"].values()) < 1e-4
    assert row["strongest_dense"] in ("dense eager", "ONNX Runtime")
    assert row["theoretical"] == pytest.approx(row["flops_dense"] / row["flops_needed"])
    causes = dict(row["losses"])
    assert causes.pop("total") == pytest.approx(sum(causes.values()))
    assert causes.keys() == {*ROUTED_LOSSES, "rest"} - {"not explained"}


def test_whole_graphs_and_a_fixed_policy():
    """What a library gets of AdaShare is not cut into blocks, and may be made for the one policy that there is."""
    policy = torch.rand(3, 7) < 0.7
    system = replace(_adashare(), whole=systems.WholeAdaShare, draw=lambda network, inputs, generator: [policy])
    (row,) = systems_experiment.run_system(
        system.build(), system, 2, name="adashare", libraries=(baselines.DenseEager,), seconds=0
    )
    assert row["failed"] == [] and row["draws"] == 1
    assert {"dense eager", "dense eager, fixed policy"} <= row["milliseconds"].keys()
    assert row["strongest_dense"] == "dense eager" and row["kept"] == pytest.approx(policy.double().mean().item())


def test_the_share_of_frames_that_are_looked_at():
    network, decisions = test_arnet.small_net(), torch.tensor([[0, 3, 6, 1, 1, 1, 4]])
    assert SYSTEMS["arnet_resnet"].kept(network, decisions) == pytest.approx(2 / 7 / 4)


@pytest.mark.parametrize("name", SMALL)
def test_a_wrong_candidate_has_no_time(name, monkeypatch):
    system = SMALL[name]()
    follow = systems_experiment.follow

    def wrong(network, policy, system, inputs, decisions):
        return follow(network, policy, system, inputs, decisions.flip(0) if name == "adashare" else decisions.flip(1))

    monkeypatch.setattr(systems_experiment, "follow", wrong)
    (row,) = systems_experiment.run_system(system.build(), system, 1, name=name, libraries=(), seconds=0)
    assert set(row["failed"]) == {"naive gather", "dynexec"} and row["realised"] is None
    assert "dynexec" not in row["milliseconds"] and "dense frozen" in row["milliseconds"]


@pytest.mark.parametrize("name", SMALL)
def test_decisions_must_change_the_output(name):
    """Masked execution of everything is no proof."""
    system = SMALL[name]()
    network = system.build()
    everything = network.example_decisions(system.inputs(1))[0]
    ones = torch.ones_like(system.weights(everything))
    system = replace(system, draw=_draw(lambda inputs, generator: everything), weights=lambda decisions: ones)
    with pytest.raises(ValueError, match="must change the network's output"):
        systems_experiment.run_system(network, system, 1, name=name, libraries=(), seconds=0)


@pytest.mark.parametrize("name", ["arnet", "adamml"])
def test_dynexec_runs_the_policy(name):
    """The FLOPs that a row charges are those of the network deciding by itself: its features run, too."""
    system = SMALL[name]()
    network, inputs = system.build(), system.inputs(1)
    seen = []
    part = "policy.lite_backbone" if name == "arnet" else "policy.joint_net.nets.0"
    network.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    (decisions, _) = system.draw(network, inputs, torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = systems_experiment.follow(network, network.policy, system, inputs, decisions)
        assert seen == [1]
        torch.testing.assert_close(output, network(inputs, decisions), rtol=1e-4, atol=1e-5)
    assert "decide" not in vars(network.policy)


def test_batch_norm_is_random_and_the_network_is_the_same_every_time():
    system = SMALL["adamml"]()
    first, again = (systems.build_system(system) for _ in range(2))
    norms = [module for module in first.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(bool(norm.running_mean.abs().max() > 0) for norm in norms) and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))


def test_published_rates():
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        networks = {name: SYSTEMS[name].build() for name in SYSTEMS}
    for name, cost in systems.ARNET_COSTS.items():
        frames = torch.empty(1, 16, 3, 224, 224, device="meta")
        draws = SYSTEMS[name].draw(networks[name], frames, generator)
        flops = networks[name].count_flops(frames)
        assert len(draws) == systems.DRAWS
        assert [flops.published(draw) for draw in draws] == pytest.approx([cost] * 2, abs=0.03)
    clips = {"rgb": torch.empty(2, 10, 8, 3, 224, 224, device="meta")}
    draws = SYSTEMS["adamml_rgb_flow_sound"].draw(networks["adamml_rgb_flow_sound"], clips, generator)
    assert torch.stack(draws).double().mean((0, 1, 2)).tolist() == pytest.approx([0.5506, 0.2682, 0.9512], abs=0.02)
    (draw,) = SYSTEMS["adashare_nyu_v2"].draw(None, None, generator)
    assert torch.equal(draw, published_policy("nyu_v2_3_tasks_resnet34"))


def test_the_command_knows_systems(monkeypatch, tmp_path, capsys):
    system = SMALL["adashare"]()
    monkeypatch.setitem(systems.SYSTEMS, "adashare_cityscapes", system)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    path = tmp_path / "rows.jsonl"
    arguments = ["--nets", "adashare_cityscapes", "--seconds", "0", "--baselines", "dense eager", "--out", str(path)]
    assert bench.main(parser.parse_args([*arguments, "--json"])) == 0
    assert '"net": "adashare_cityscapes"' in capsys.readouterr().out and path.read_text().count("\n") == 1


def test_profile_knows_systems(monkeypatch, tmp_path, capsys):
    system = SMALL["adamml"]()
    monkeypatch.setitem(systems.SYSTEMS, "adamml_rgb_sound", system)
    arguments = ["profile", "adamml_rgb_sound", "--rounds", "1", "--batch", "2"]
    assert cli.main([*arguments, "--json", str(tmp_path / "profile.json")]) == 0
    found = Profile.read_json(tmp_path / "profile.json")
    assert (found.executor, found.samples) == ("routed", 2) and found.parts[0].kind == "policy"
    assert "between parts" in capsys.readouterr().out
    assert cli.main([*arguments, "--keep", "0.5"]) == 1 and "published ones" in capsys.readouterr().out


def test_every_model_has_a_name():
    assert models.list_models() == sorted(
        ["adamml", "adashare_resnet101", "adashare_resnet18", "adashare_resnet34", "arnet_efficientnet", "arnet_resnet"]
        + [f"blockdrop_{net}" for net in ("resnet101_imagenet", "resnet110_cifar10", "resnet110_cifar100")]
        + ["blockdrop_resnet32_cifar10", "blockdrop_resnet32_cifar100", "feature_sharing_vgg16", "spottune_resnet26"]
    )


def test_the_table_of_models_is_what_they_are():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert markdown_table(HEADINGS, model_rows()) in text, "run python bench/tables.py"
