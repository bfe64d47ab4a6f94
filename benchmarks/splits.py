"""How good is the split? PipeDream's profiles beside torchgpipe's balancer, and the search's speed.

    python -m benchmarks.splits

For each profile and K: the balance (mean stage / largest stage) of torchgpipe 0.0.7's
`balance.blockpartition.solve` on the costs in Kahn's order, of the exact contiguous cut of that
order, and of `autopipe.partition`; what the lower bound leaves possible at most; the gap between
the two; seconds. Bars: the gap at most 1 % everywhere; never below the contiguous cut; the
geometric mean over the profiles at K = 8 at least 1.16 times torchgpipe's.

Then the speed: nasnetalarge at K = 8 (bar 1 s), and random layered graphs of 20,000 nodes at K = 64
(bar 20 s and 2 GB), three runs each, on the clock and of the processor.
"""

from __future__ import annotations

import math
import random
import resource
import time
from pathlib import Path

from autopipe import CostGraph, Partition, partition
from autopipe.passes.partition import cut_chain

PROFILES = Path(__file__).parents[1] / "tests" / "data" / "pipedream"
MODELS = (
    "inception_v3",
    "nasnetalarge",
    "resnet50",
    "densenet121",
    "squeezenet1_0",
    "gnmt",
    "vgg16",
)
STAGES = (2, 4, 8, 16)


def torchgpipe(costs: list[float], stages: int) -> float:
    """The largest stage of torchgpipe's balancer; NaN where it is not installed."""
    try:
        from torchgpipe.balance.blockpartition import solve
    except ImportError:
        return math.nan
    return max(sum(block) for block in solve(costs, stages))


def contiguous(costs: list[float], stages: int) -> float:
    """The largest stage of the exact contiguous cut."""
    bounds = [0, *cut_chain(costs, stages), len(costs)]
    return max(math.fsum(costs[bounds[k] : bounds[k + 1]]) for k in range(stages))


def layered(nodes: int, width: int, seed: int) -> CostGraph:
    """Layers of `width` nodes; each node uses two of the layer before; costs are lognormal."""
    generator = random.Random(seed)
    edges = [
        (generator.randrange((v // width - 1) * width, v // width * width), v)
        for v in range(width, nodes)
        for _ in range(2)
    ]
    seconds = tuple(generator.lognormvariate(0, 1) for _ in range(nodes))
    nbytes = tuple(generator.randint(1, 10**6) for _ in range(nodes))
    return CostGraph(tuple(map(str, range(nodes))), seconds, tuple(edges), nbytes)


def timed(graph: CostGraph, stages: int) -> tuple[Partition, float, float]:
    """The partition, and the seconds that it took on the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    result = partition(graph, stages)
    return result, time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    print(f"{'profile':14} {'K':>2}  torchgpipe  contiguous    ours   limit       gap  seconds")
    ratios, gaps, worse = [], [], 0
    for model in MODELS:
        graph = CostGraph.from_pipedream(PROFILES / f"{model}.txt")
        costs = [graph.seconds[node] for node in graph.order()]
        for K in STAGES:
            mean = math.fsum(costs) / K
            theirs, plain = torchgpipe(costs, K), contiguous(costs, K)
            ours, _, seconds = timed(graph, K)
            ours.verify(graph)
            gaps.append(ours.gap)
            worse += ours.bottleneck > plain
            if K == 8:
                ratios.append(theirs / ours.bottleneck)
            limit = mean / ours.lower_bound
            print(
                f"{model:14} {K:2}  {mean / theirs:10.3f}  {mean / plain:10.3f}  "
                f"{ours.balance:6.4f}  {limit:6.4f}  {ours.gap:8.4%}  {seconds:7.2f}"
            )
    print(f"largest gap {max(gaps):.4%} (bar 1 %); optimal {gaps.count(0.0)} of {len(gaps)}")
    print(f"below the contiguous cut: {worse} (bar 0)")
    mean = math.prod(ratios) ** (1 / len(ratios))
    print(f"over torchgpipe at K = 8, geometric mean: {mean:.3f} (bar 1.16)")

    cases = [("nasnetalarge", CostGraph.from_pipedream(PROFILES / "nasnetalarge.txt"), 8)]
    cases += [(f"layered, {width} wide", layered(20_000, width, seed=0), 64) for width in (20, 300)]
    for name, graph, K in cases:
        for _ in range(3):
            result, clock, processor = timed(graph, K)
            print(
                f"{name}, {len(graph.names):,} nodes, K = {K}: {clock:.2f} s on the clock, "
                f"{processor:.2f} s of the processor, gap {result.gap:.4%}"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
