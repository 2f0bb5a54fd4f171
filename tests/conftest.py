"""What holds for every test: one thread, NaN in memory nobody wrote, a cost cache of the tests', modes put back."""

import os

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU; it wants to know before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One thread, also in the processes that tests start: threads of tiny tensors gain nothing, and on a busy machine they
# spin against each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--shard", help="I/N: of the tests every N-th, from the I-th on")


def pytest_collection_modifyitems(config, items):
    if (shard := config.getoption("--shard")) is not None:
        first, step = map(int, shard.split("/"))
        items[:] = items[first::step]


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """A result that reads memory nobody wrote is NaN, not by luck what was there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)


@pytest.fixture(params=["deterministic", "default"])
def algorithms(request, nan_in_uninitialised_memory):
    """Run a test a second time with torch's default kernels, which users get; NaN is then not filled in."""
    if request.param == "default":
        torch.use_deterministic_algorithms(False)


def modes():
    """What torch computes with from here on, in this thread."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "modes of functions": torch._C._len_torch_function_stack(),
        "modes of dispatch": torch._C._len_torch_dispatch_stack(),
    }


@pytest.fixture(autouse=True)
def modes_are_put_back():
    """A test that leaves another mode behind fails itself; of gradients and dtype nothing is left to the next one."""
    before = modes()
    yield
    left = modes()
    torch.set_grad_enabled(before["gradients"])
    torch.set_default_dtype(before["default dtype"])
    assert left == before


@pytest.fixture(autouse=True, scope="session")
def cost_cache(tmp_path_factory):
    """Measured costs of the tests' networks, not among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
