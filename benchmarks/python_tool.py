"""The python tool under load: 1,000 calls from 64 concurrent rollouts, without and with calls that hang.

    python benchmarks/python_tool.py     (about 3 minutes on two cores)

Each rollout computes with numpy, keeps a variable and prints; its first call waits for an interpreter. In the second
and third run one call in ten hangs until its deadline of two seconds: asleep, or in a busy loop. The rollout that made
it then needs a new interpreter, which its next call waits for. Latency is what the agent waits for: that of all calls
that do not hang, starts included. A call is lost where it does not return what it must.

The runs take turns; the figures are medians over the rounds.
"""

import asyncio
import random
import statistics
import sys
import time

from timing import machine, table, write

from axpo.tools.base import Conversation, Fault, Toolbox
from axpo.tools.python import make_python
from axpo.tools.sandbox import BUBBLEWRAP, Sandbox

CALLS, ROLLOUTS, HANGING, DEADLINE, ROUNDS = 1000, 64, 0.1, 2.0, 5
CODE = "import numpy as np\nn = globals().get('n', 0) + 1\nprint({number}, int(np.arange(1000).sum()))"
RUNS = {"none hangs": None, "10 % sleep": "import time; time.sleep(1000)", "10 % busy": "while True: pass"}


async def load(sandbox: Sandbox, hang: str | None, seed: int) -> dict[str, float]:
    """One run: its latencies in milliseconds, the seconds it took, and how many calls were lost."""
    toolbox = Toolbox([make_python(sandbox, DEADLINE)])
    chance = random.Random(seed)
    hanging = set(chance.sample(range(CALLS), int(CALLS * HANGING))) if hang else set()
    latencies: list[float] = []
    lost = 0

    async def rollout(numbers: range) -> None:
        nonlocal lost
        async with Conversation() as conversation:
            for number in numbers:
                started = time.perf_counter()
                code = hang if hang and number in hanging else CODE.format(number=number)
                result = await toolbox.call("python", {"code": code}, conversation)
                if number in hanging:
                    lost += result.fault is not Fault.TIMEOUT
                else:
                    latencies.append(1000 * (time.perf_counter() - started))
                    lost += result.text != f"{number} 499500"

    started = time.perf_counter()
    await asyncio.gather(*(rollout(range(first, CALLS, ROLLOUTS)) for first in range(ROLLOUTS)))
    centiles = statistics.quantiles(latencies, n=100)
    seconds = time.perf_counter() - started
    return {"p50_ms": centiles[49], "p99_ms": centiles[98], "seconds": seconds, "lost": lost}


async def start(sandbox: Sandbox) -> float:
    """Milliseconds to the first answer of one interpreter, alone."""
    interpreter = sandbox.interpreter()
    started = time.perf_counter()
    await interpreter.run("1", DEADLINE)
    elapsed = 1000 * (time.perf_counter() - started)
    interpreter.close()
    return elapsed


def main(level: str) -> None:
    sandbox = Sandbox(level)
    sandbox.check()
    starts = [asyncio.run(start(sandbox)) for _ in range(50)]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for number in range(ROUNDS):
        for name, hang in RUNS.items():
            runs[name].append(asyncio.run(load(sandbox, hang, number)))
    figures = {
        name: {
            **{key: statistics.median(run[key] for run in found) for key in ("p50_ms", "p99_ms", "seconds")},
            "lost": sum(run["lost"] for run in found),
        }
        for name, found in runs.items()
    }
    base = figures["none hangs"]["p99_ms"]
    rows = [
        {
            "run": name,
            "p50 ms": f"{f['p50_ms']:.1f}",
            "p99 ms": f"{f['p99_ms']:.0f}",
            "p99 / none hangs": f"{f['p99_ms'] / base:.2f}",
            "seconds": f"{f['seconds']:.1f}",
            "lost": f"{f['lost']:g}",
        }
        for name, f in figures.items()
    ]
    print(f"start of an interpreter: median {statistics.median(starts):.0f} ms, most {max(starts):.0f} ms")
    print(table(rows))
    write("python_tool", {"machine": machine(), "level": level, "start_ms": starts, "runs": runs, "figures": figures})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else BUBBLEWRAP)
