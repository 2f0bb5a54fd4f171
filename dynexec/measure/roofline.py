"""Estimates the time that a GPU needs for a network from its rates: a model of what to expect before measuring.

A kernel takes as long as its arithmetic or its memory traffic, whichever is longer, plus a fixed time to start and to
drain (Williams et al., "Roofline", 2009, with launches and whole tiles on top).
"""

from dataclasses import dataclass, replace
from math import ceil

_EMPTY = 0.3e-6  # seconds of a kernel that finds nothing to do
_MAX_SPLIT, _TERMS = 8, 1024  # as of kernels/conv.py


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU.

    Attributes
    ----------
    multiprocessors : int
    flops : float
        FLOP per second of large matrix products in 16 bits.
    bandwidth, cache_bandwidth : float
        Bytes per second, read plus written, of the memory and of its cache.
    cache_bytes : float
        Usable size of the cache.
    launch, dependent_launch : float
        Seconds between two kernels of a CUDA graph of which one needs the other, plain and with programmatic dependent
        launch.
    fill : float
        Seconds that a kernel takes to fill and drain its pipelines.
    clusters : bool
        Whether thread blocks can share a sample.
    efficiency : tuple of (int, float)
        Share of ``flops`` reached by tiles of at least that many outputs, largest first.
    """

    name: str
    multiprocessors: int
    flops: float
    bandwidth: float
    cache_bandwidth: float
    cache_bytes: float
    launch: float
    dependent_launch: float
    fill: float
    clusters: bool
    efficiency: tuple[tuple[int, float], ...]

    def resize(self, name, multiprocessors, clusters):
        """Return a GPU of the same kind with more or fewer multiprocessors: a rough guide to other models."""
        share = multiprocessors / self.multiprocessors
        rates = {rate: share * getattr(self, rate) for rate in ("flops", "bandwidth", "cache_bandwidth", "cache_bytes")}
        return replace(self, name=name, multiprocessors=multiprocessors, clusters=clusters, **rates)


#: An H100 or H200 SXM. The rate of large products was measured on an H100; the others are fitted to convolutions that
#: were measured on an H200 (bench/tiles.jsonl), which the model then gives with an error of 19 % (root mean square).
H100 = Gpu(
    name="H100 SXM",
    multiprocessors=132,
    flops=798e12,
    bandwidth=3.2e12,
    cache_bandwidth=2.7e12,
    cache_bytes=60e6,
    launch=1.3e-6,
    dependent_launch=0.6e-6,
    fill=2.6e-6,
    clusters=True,
    efficiency=((128 * 128, 0.67), (128 * 64, 0.58), (64 * 64, 0.52), (128 * 32, 0.40), (0, 0.33)),
)


@dataclass(frozen=True)
class Layer:
    """A kernel of a network.

    Attributes
    ----------
    pixels, channels, reduction : int
        Size of one sample's matrix product: rows, columns, and terms of each sum; 0 terms if there is no product.
    traffic, weights : int
        Bytes read and written per sample, and bytes of weights.
    tile : (int, int, int), optional
        Rows and columns of a tile, and how many tiles a multiprocessor works on at once; None: a library's choice.
    launched : bool
        Whether it is a kernel of its own rather than the second part of the previous one.
    dependent : bool
        Whether it is launched with programmatic dependent launch, if it is one of dynexec's kernels.
    shares : bool
        Whether several programs share the sums of the last tiles, where these leave multiprocessors idle.
    """

    pixels: int
    channels: int
    reduction: int
    traffic: int
    weights: int
    tile: tuple[int, int, int] | None = None
    launched: bool = True
    dependent: bool = True
    shares: bool = True


def layer_seconds(gpu: Gpu, layer: Layer, samples: int) -> float:
    """Estimate the seconds that a layer takes for this number of samples, launch included."""
    launch = gpu.dependent_launch if layer.dependent and layer.tile is not None else gpu.launch
    if samples == 0:
        return (launch + _EMPTY) * layer.launched
    traffic = samples * layer.traffic + layer.weights
    memory = traffic / (gpu.cache_bandwidth if traffic <= gpu.cache_bytes else gpu.bandwidth)
    return max(_arithmetic(gpu, layer, samples), memory) + (launch + gpu.fill) * layer.launched


def _arithmetic(gpu, layer, samples):
    if layer.reduction == 0:
        return 0.0
    # A library is taken to choose the best of these.
    tiles = [layer.tile] if layer.tile else [(128, 128, 1), (128, 64, 2), (64, 64, 3)]
    return min(_tiled(gpu, layer, samples, *tile) for tile in tiles)


def _tiled(gpu, layer, samples, rows, columns, together):
    places = gpu.multiprocessors * together
    tiles = ceil(samples * layer.pixels / rows) * ceil(layer.channels / columns)
    full, left = divmod(tiles, places)
    most = min(max(layer.reduction // _TERMS, 1), _MAX_SPLIT) if layer.shares else 1
    split = min(max(gpu.multiprocessors // max(left, 1), 1), most)
    share = next(share for outputs, share in gpu.efficiency if rows * columns >= outputs)
    rounds = full + (left > 0) / split
    seconds = rounds * 2 * rows * columns * layer.reduction / (share * gpu.flops / places)
    if left > 0 and split > 1:  # parts of sums are written and read
        seconds += 2 * 4 * split * left * rows * columns / gpu.cache_bandwidth
    return seconds
