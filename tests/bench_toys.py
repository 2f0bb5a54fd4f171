"""A network small enough to measure in a test, the cheap baselines, and an executor that is wrong."""

from dynexec.models import blockdrop_resnet
from dynexec.report import baselines, experiment, nets

EAGER = (baselines.MaskedEager, baselines.DenseEager, baselines.NaiveGather, baselines.GroupByPolicy)


def tiny(depth=(2, 2)):
    return blockdrop_resnet(depth, (8, 16), num_classes=5)


TINY = nets.Net(tiny, 16, (2,), published=nets.Published(kept=3.0, policies=2))


def run(model, images, keeps=(0.5,), **options):
    """Rows of an experiment that takes no time."""
    options = {"name": "tiny", "baselines": EAGER, "seconds": 0} | options
    blocks = experiment.num_blocks(model)
    settings = [experiment.draw_decisions(keep, blocks, len(images)) for keep in keeps]
    return experiment.run_experiment(model, images, settings, **options)


class ShiftsColumns(baselines.Dynexec):
    def __call__(self, images, decisions):
        return super().__call__(images, decisions.roll(1, 1))
