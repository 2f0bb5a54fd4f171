"""The file from which an interrupted training continues as if it had not been interrupted."""

import copy
import os
import pickle
import zipfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dynexec.files import replacing
from dynexec.models.checkpoints import mismatches

_FORMAT = "dynexec.models.training 1"
#: What the optimizers of the trainers keep for a parameter.
_KEPT = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}
_FOREIGN = "is no file of dynexec.models.training, or of another version"
_ENTRIES = {"format", "settings", "network", "optimizer", "schedule", "generators", "history"}


class TrainingCheckpoint:
    """Everything that the rest of a training depends on, and the file that holds it after each epoch.

    Parameters
    ----------
    path : path
        Its folder must exist. If there are several processes, the first one reads and writes it.
    settings : dict
        Numbers and names; a file with different settings belongs to another training.
    net : nn.Module
    optimizer, schedule
        From ``torch.optim``.
    generator : torch.Generator or None
        Used besides PyTorch's own, whose states are in the file, too.
    group : torch.distributed.ProcessGroup or None
        The processes that train together, see :func:`training_group`.
    """

    def __init__(self, path, settings, net, optimizer, schedule, generator, group):
        self.path, self.settings, self.generator, self.group = path, settings, generator, group
        self.parts = {"optimizer": optimizer, "schedule": schedule, "network": net}

    def start(self):
        """Continue from the file if it exists, otherwise write it; return the history so far, a list of dict.

        ValueError, in all processes, if it is damaged or belongs to another training; file and network are then left as
        they are.
        """
        saved, problem = None, None
        if self._rank() == 0 and os.path.lexists(self.path):
            saved = _read(self.path)
            problem = saved if isinstance(saved, str) else self._misfit(saved)
        if self.group is not None:
            message = [saved, problem]
            dist.broadcast_object_list(message, group=self.group, group_src=0)
            saved, problem = message
        if problem is not None:
            raise self._error(problem)
        if saved is None:
            self.save([])
            return []
        self._load(saved, saved["generators"][self._rank()])
        return saved["history"]

    def save(self, history):
        """Replace the file atomically: whenever this is interrupted, the old or the new one is there, complete."""
        generators = [self._generators()]
        if self.group is not None:
            mine, generators = generators[0], [None] * self.group.size()
            dist.all_gather_object(generators, mine, group=self.group)
        if self._rank() != 0:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"format": _FORMAT, "settings": self.settings, "generators": generators, "history": history}
        with replacing(self.path, "wb", suffix=".part") as file:
            torch.save(state, file)

    def _load(self, saved, generators):
        """Load everything or nothing: a failure, which only a forged file can cause, leaves everything as it was."""
        before = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}
        own = self._generators()
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self._set_generators(generators)
        except Exception as error:  # depends on what it holds
            for name, part in self.parts.items():
                part.load_state_dict(before[name])
            self._set_generators(own)
            raise self._error(f"{_FOREIGN}: {type(error).__name__}: {error}") from error

    def _error(self, problem):
        return ValueError(
            f"checkpoint {str(self.path)!r} {problem}\nIt is left as it is: remove it or give another path"
        )

    def _rank(self):
        return 0 if self.group is None else self.group.rank()

    def _misfit(self, saved):
        """Return why training cannot continue from ``saved`` here, or None."""
        if saved["settings"] != self.settings:
            names = sorted(saved["settings"].keys() | self.settings.keys(), key=str)
            pairs = [(name, saved["settings"].get(name), self.settings.get(name)) for name in names]
            changed = [f"{name} {old!r} there and {new!r} here" for name, old, new in pairs if old != new]
            return f"is of another training: {', '.join(changed)}"
        processes = 1 if self.group is None else self.group.size()
        if len(saved["generators"]) != processes:
            return f"was written by {len(saved['generators'])} processes together, and these are {processes}"
        had_one = saved["generators"][0]["own"] is not None
        if had_one != (self.generator is not None):
            return f"was written {'with' if had_one else 'without'} generator=, unlike this training"
        if problems := mismatches("network", self.parts["network"].state_dict(), saved["network"]):
            return "\n".join(["is of another network:", *problems])
        return None if self._fits_optimizer(saved) else _FOREIGN

    def _fits_optimizer(self, saved):
        optimizer = self.parts["optimizer"]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own, theirs = optimizer.state_dict(), saved["optimizer"]
        return (
            _alike(saved["schedule"], self.parts["schedule"].state_dict())
            and isinstance(theirs, dict)
            and theirs.keys() == own.keys()
            and _alike(theirs["param_groups"], own["param_groups"])
            and [group["params"] for group in theirs["param_groups"]]
            == [group["params"] for group in own["param_groups"]]
            and isinstance(theirs["state"], dict)
            and all(
                type(number) is int
                and 0 <= number < len(parameters)
                and isinstance(entry, dict)
                and entry.keys() == _KEPT[type(optimizer)]
                and all(_fits_parameter(value, name, parameters[number]) for name, value in entry.items())
                for number, entry in theirs["state"].items()
            )
        )

    def _generators(self):
        """Return the states of this process's random generators, each a tensor or None."""
        device = self._gpu()
        return {
            "own": None if self.generator is None else self.generator.get_state(),
            "cpu": torch.get_rng_state(),
            "gpu": None if device is None else torch.cuda.get_rng_state(device),
        }

    def _set_generators(self, states):
        if self.generator is not None:
            self.generator.set_state(states["own"])
        torch.set_rng_state(states["cpu"])
        if states["gpu"] is not None and (device := self._gpu()) is not None:
            torch.cuda.set_rng_state(states["gpu"], device)

    def _gpu(self):
        device = next(self.parts["network"].parameters()).device
        return device if device.type == "cuda" else None


def training_group(net):
    """Return the processes that train ``net`` together: those of its DistributedDataParallel parts, or None."""
    parts = [part for part in net.modules() if isinstance(part, DistributedDataParallel)]
    return parts[0].process_group if parts else None


def check_same_settings(settings, group):
    """Raise ValueError in all processes of ``group`` unless their settings agree: otherwise they would hang."""
    everyones = [None] * group.size()
    dist.all_gather_object(everyones, settings, group=group)
    differing = [name for name in settings if any(other[name] != settings[name] for other in everyones)]
    if differing:
        found = "; ".join(f"{name}: {[other[name] for other in everyones]}" for name in differing)
        raise ValueError(f"processes that train together need equal settings and numbers of images, got {found}")


def _read(path):
    """Return the contents of a file, or why it cannot be used. Never executes code from it."""
    try:
        file = open(path, "rb")
    except OSError as error:
        return f"cannot be read ({error})"
    with file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load does not look at checksums
                if (entry := archive.testzip()) is not None:
                    return f"is damaged: the checksum of its entry {entry!r} is wrong"
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises depends on where the damage is
            reason = "" if isinstance(error, pickle.UnpicklingError) else f": {error}".split("\n")[0]
            return f"is damaged, or not a file of this training ({type(error).__name__}{reason})"
    return saved if _is_checkpoint(saved) else _FOREIGN


def _is_checkpoint(saved):
    """Whether a file holds what :meth:`TrainingCheckpoint.save` writes, as far as can be told without its network."""
    if not isinstance(saved, dict) or saved.keys() != _ENTRIES or not isinstance(saved["format"], str):
        return False
    settings, network, generators, history = (saved[k] for k in ("settings", "network", "generators", "history"))
    return (
        saved["format"] == _FORMAT
        and isinstance(settings, dict)
        and all(value is None or isinstance(value, (bool, int, float, str)) for value in settings.values())
        and isinstance(network, dict)
        and all(isinstance(name, str) for name in network)
        and isinstance(generators, list)
        and len(generators) > 0
        and all(isinstance(states, dict) and states.keys() == {"own", "cpu", "gpu"} for states in generators)
        and isinstance(history, list)
        and all(isinstance(epoch, dict) for epoch in history)
    )


def _alike(saved, own):
    """Whether two values have the same structure: the same keys, numbers of elements and types."""
    if type(saved) is not type(own):
        return False
    if isinstance(own, dict):
        return saved.keys() == own.keys() and all(_alike(saved[key], own[key]) for key in own)
    if isinstance(own, (list, tuple)):
        return len(saved) == len(own) and all(map(_alike, saved, own))
    return True


def _fits_parameter(value, name, parameter):
    """Whether ``value`` is what an optimizer may keep for a parameter under this name."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    # Written to in place, so that each element needs a place of its own, which what was expanded does not have.
    by_stride = sorted(range(value.dim()), key=value.stride, reverse=True)
    whole = value.permute(by_stride).is_contiguous()
    return whole and value.is_floating_point() and value.shape == (() if name == "step" else parameter.shape)
