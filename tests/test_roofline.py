"""The model of a GPU's time, layer by layer."""

from dataclasses import replace

import pytest

from dynexec.measure.roofline import H100, Layer, layer_seconds

DENSE = Layer(pixels=196, channels=256, reduction=2304, traffic=2 * 2 * 196 * 256, weights=2 * 256 * 2304)
OURS = replace(DENSE, tile=(128, 128, 1))


def test_a_large_product_takes_its_flops_at_the_tiles_rate():
    samples = 132 * 128 // 196 * 64
    flops = 2 * samples * 196 * 256 * 2304
    expected = flops / (0.67 * H100.flops)
    assert layer_seconds(H100, DENSE, samples) == pytest.approx(expected, rel=0.05)


def test_traffic_counts_where_there_is_little_arithmetic():
    copy = Layer(1, 1, 0, 10**6, 0)
    seconds = layer_seconds(H100, copy, 1000)
    assert seconds == pytest.approx(1e9 / H100.bandwidth + H100.launch + H100.fill)
    assert layer_seconds(H100, copy, 10) == pytest.approx(1e7 / H100.cache_bandwidth + H100.launch + H100.fill)


def test_few_samples_are_split_but_never_free():
    times = [layer_seconds(H100, OURS, n) for n in (0, 1, 16, 64, 256)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(H100.dependent_launch + 0.3e-6)
    alone = layer_seconds(H100, replace(OURS, tile=(64, 64, 3)), 1)
    assert alone < 8 * times[0] + 1e-5


def test_the_second_part_of_a_launch_starts_nothing():
    second = replace(OURS, launched=False)
    assert layer_seconds(H100, second, 0) == 0.0
    started = H100.dependent_launch + H100.fill
    assert layer_seconds(H100, OURS, 8) - layer_seconds(H100, second, 8) == pytest.approx(started)


def test_half_a_gpu_takes_twice_as_long_for_what_is_large():
    half = H100.resize("half", H100.multiprocessors // 2, False)
    assert layer_seconds(half, DENSE, 4096) == pytest.approx(2 * layer_seconds(H100, DENSE, 4096), rel=0.01)
    assert half.name == "half" and half.launch == H100.launch
