import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """A result that reads memory nobody wrote is NaN, not by luck what was there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
