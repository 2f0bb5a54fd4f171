"""Deleting blocks, and the study of what it costs."""

import pytest
import torch
from toys import torchvision_style

import dynexec
from dynexec import models
from dynexec.nn import DynamicNetwork


@pytest.fixture
def converted():
    model = torchvision_style()
    dynexec.convert(model)
    return model


@pytest.fixture
def data(converted):
    """Images with the whole network's own predictions as labels: its error is 0, and deletions show."""
    images = torch.randn(40, 3, 8, 8)
    with torch.no_grad():
        converted.head.bias -= converted(images).mean(0)  # so that all classes are predicted
    return images, converted(images).argmax(1)


def test_deleted_blocks_are_dropped_for_every_sample(converted, data):
    decisions = models.delete_blocks(converted, [0, 3])
    assert decisions.tolist() == [False, True, True, False, True]
    reference = torchvision_style()
    reference.load_state_dict(converted.state_dict())
    reference.layers[0][0] = torch.nn.Identity()
    reference.layers[1][1] = torch.nn.Identity()
    with dynexec.decide(decisions):
        torch.testing.assert_close(converted(data[0]), reference(data[0]))


def test_nothing_and_everything_can_be_deleted(converted):
    assert models.delete_blocks(converted, []).all()
    assert not models.delete_blocks(converted, range(5)).any()
    assert models.delete_blocks(converted, torch.tensor([1, 2])).tolist() == [True, False, False, True, True]


def test_columns_that_do_not_exist(converted):
    with pytest.raises(ValueError, match=r"columns from 0 to 4, got \[5, -1\]"):
        models.delete_blocks(converted, [1, 5, -1])


@pytest.mark.parametrize("blocks", [3, None, [1.5], ["1"], [True, False], torch.ones(5, dtype=torch.bool)])
def test_blocks_must_be_column_numbers(converted, blocks):
    with pytest.raises(TypeError, match="blocks must be a sequence of column numbers, got"):
        models.delete_blocks(converted, blocks)


def test_a_model_that_was_not_converted():
    with pytest.raises(ValueError, match="model must be converted or a DynamicNetwork, got a Network in which no"):
        models.delete_blocks(torchvision_style(), [])


@pytest.mark.parametrize("wrap", [lambda model: model, DynamicNetwork])
def test_study(converted, data, wrap):
    study = models.lesion_study(wrap(converted), *data, draws=3, seed=1)
    assert study.error == 0.0
    assert len(study.by_block) == 5
    for block, error in enumerate(study.by_block):
        with dynexec.decide(models.delete_blocks(converted, [block])), torch.no_grad():
            expected = (converted(data[0]).argmax(1) != data[1]).double().mean().item()
        assert error == pytest.approx(expected)
    assert [len(draws) for draws in study.by_count] == [1, 3, 3, 3, 3, 1]
    assert set(study.by_count[1]) <= set(study.by_block)
    assert sum(study.by_count[5]) > 0
    assert study == models.lesion_study(wrap(converted), *data, draws=3, seed=1, batch_size=7)


def test_study_can_stop_early_and_says_what_is_wrong(converted, data):
    assert len(models.lesion_study(converted, *data, max_deleted=2, draws=2).by_count) == 3
    with pytest.raises(ValueError, match="max_deleted must be between 0 and 5, got 6"):
        models.lesion_study(converted, *data, max_deleted=6)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        models.lesion_study(converted, *data, draws=0)


def test_study_needs_no_policy_and_leaves_modes_alone(data):
    net = models.blockdrop_resnet((1, 1), (4, 8), num_classes=5).train()
    models.lesion_study(net, *data, draws=1)
    assert net.training and net.backbone.training
    net.backbone.bn1.eval()
    models.lesion_study(net, *data, draws=1, max_deleted=0)
    assert net.training and not net.backbone.bn1.training


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    study = models.LesionStudy(0.1, (0.2, 0.3), ((0.1,), (0.2, 0.3), (0.9,)))
    figure = models.plot_lesion(study, tmp_path / "lesion.png")
    assert (tmp_path / "lesion.png").stat().st_size > 1000
    single, many = figure.axes
    assert [bar.get_height() for bar in single.patches] == pytest.approx([20, 30])
    assert many.lines[0].get_ydata().tolist() == pytest.approx([10, 25, 90])
