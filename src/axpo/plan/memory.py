"""Memory of a GPU by part and moment, and of the host."""

from dataclasses import dataclass

from axpo.config import Config
from axpo.plan.activations import FLOAT32, Activations, Batch, Compute, activations, layer_bytes
from axpo.plan.shapes import Shape

GIB = 2**30
CONTEXT = GIB  # what CUDA and its libraries take for themselves (assumed)
USABLE = 0.95  # of a GPU's memory; the rest is lost between blocks of the allocator (assumed)
VLLM_WORK = 2 * GIB  # what vLLM computes with, of its share (assumed)
PROCESS = 2 * GIB  # of the host, a process with torch, CUDA's libraries and decoded images (assumed)

PARTS = (
    "weights",
    "gathered weights",
    "gradients",
    "optimizer",
    "reference policy",
    "activations",
    "logits",
    "keys and values",
    "vLLM",
    "CUDA context",
)


@dataclass(frozen=True)
class Moment:
    """A time of a step, and the bytes that each of PARTS takes of a GPU then."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sizes:
    """What lasts, in bytes of one process."""

    whole: int  # all weights, not sharded
    weights: int
    gradients: int  # those that packs are added up in
    optimizer: int
    reference: int
    stepping: int  # what a step of the optimizer makes for the moment
    gathered: int  # what FSDP has whole amid a backward
    reduced: int  # what it adds up the gradients of all else with, at the backward's end

    @staticmethod
    def of(config: Config, shape: Shape, tuning: bool) -> "Sizes":
        """`tuning`: supervised, without a reference."""
        e, rank = itemsize(config), config.lora.rank
        processes = config.parallel.processes
        share = processes if config.parallel.sharding == "full" else 1
        adapters = shape.adapters(rank, config.lora.targets) * e if rank else 0
        whole = shape.parameters * e + adapters
        numbers = trained(config, shape)
        copies = FLOAT32 if e < FLOAT32 or config.parallel.offload else 0  # what is stepped (optimizer.py)
        # On CUDA the roots of the second moments, of all weights at once.
        stepping = FLOAT32 if config.device.startswith("cuda") and not config.parallel.offload else 0
        refers = not tuning and config.method.kl > 0 and not rank
        # All but the layers is gathered for the whole update, and its gradients are whole until its end; of the layers
        # one computes and the next is fetched (sharding.py). Gradients are added up in float32.
        outer = shape.parameters - shape.layers * shape.layer_parameters
        learns = 0 if rank else outer - (0 if config.train.vision else shape.vision_parameters)
        layer = 0 if rank else shape.layer_parameters
        gathered = (outer + learns + 2 * shape.layer_parameters + layer) * e + layer * FLOAT32
        # They are whole, and so is what is sent; its share comes back beside all others, until they are added up.
        reduced = learns * (e + FLOAT32) + (learns * FLOAT32 + numbers * e) // share
        return Sizes(
            whole=whole,
            weights=whole // share,
            gradients=numbers * FLOAT32 // share,
            optimizer=numbers * (2 * FLOAT32 + copies) // share,
            reference=shape.parameters * e // share if refers else 0,
            stepping=numbers * stepping // share,
            gathered=gathered if share > 1 else 0,
            reduced=reduced if share > 1 else 0,
        )


def itemsize(config: Config) -> int:
    """Bytes of a weight."""
    return 2 if config.dtype == "bfloat16" else FLOAT32


def trained(config: Config, shape: Shape) -> int:
    """How many numbers the optimizer steps."""
    if config.lora.rank:
        return shape.adapters(config.lora.rank, config.lora.targets)
    return shape.parameters - (0 if config.train.vision else shape.vision_parameters)


def compute_of(config: Config) -> Compute:
    """How the config's updates compute. Adapters are the language model's, and leave the vision tower as it is."""
    return Compute(
        weight=itemsize(config),
        autocast=config.train.autocast,
        checkpointing=config.train.gradient_checkpointing,
        vision=config.train.vision and not config.lora.rank,
        rank=config.lora.rank,
    )


def moments(config: Config, shape: Shape, batch: Batch, gpu_memory: int | None, tuning: bool = False) -> list[Moment]:
    """The moments of a step that can take most; `gpu_memory` in bytes, None where it is not known."""
    sizes, compute = Sizes.of(config, shape, tuning), compute_of(config)
    work = activations(shape, batch, compute)
    away = config.parallel.offload
    lasting = {"weights": sizes.weights, "CUDA context": CONTEXT if config.device.startswith("cuda") else 0}
    resting = {
        "optimizer": 0 if away else sizes.optimizer,
        "reference policy": 0 if away else sizes.reference,
    }
    # The copies of offloaded weights have theirs in the host's memory too; a backward's own are there by its end.
    own = trained(config, shape) * itemsize(config)
    held = lasting | resting | {"gradients": own if away else sizes.gradients}
    found = []
    if away or sizes.weights < sizes.whole:
        found.append(Moment("start", lasting | _starting(config, shape, sizes, gpu_memory, tuning)))
    if not tuning:
        found.append(Moment("rollout", lasting | resting | _generating(config, shape, sizes, gpu_memory)))
    if away and sizes.reference:  # it comes for its forward, which saves nothing, and goes before the policy's
        forward = {"activations": batch.tokens * layer_bytes(shape, compute)}
        found.append(Moment("reference", held | {"reference policy": sizes.reference} | forward))
    found.append(Moment("update", held | _update(work) | {"gathered weights": sizes.gathered}))
    if sizes.reduced:
        found.append(Moment("reduction", held | {"gradients": held["gradients"] + sizes.reduced}))
    stepped = 0 if away else sizes.optimizer + sizes.stepping
    return [*found, Moment("optimizer", held | {"optimizer": stepped})]


def _starting(config: Config, shape: Shape, sizes: Sizes, gpu_memory: int | None, tuning: bool) -> dict[str, int]:
    """Weights are whole until they are divided. vLLM starts beside them, and has gone to sleep when the reference is
    copied from them."""
    vllm = 0 if tuning else _generating(config, shape, sizes, gpu_memory).get("vLLM", 0)
    reference = shape.parameters * itemsize(config) if sizes.reference else 0
    held = {"vLLM": vllm} if vllm > reference else {"reference policy": reference}
    return {"weights": sizes.whole} | held


def _update(work: Activations) -> dict[str, int]:
    """Either a layer or the logits are worked on: what is larger counts."""
    if work.head > work.working:
        return {"activations": work.saved, "logits": work.head}
    return {"activations": work.saved + work.working, "logits": 0}


def _generating(config: Config, shape: Shape, sizes: Sizes, gpu_memory: int | None) -> dict[str, int]:
    if config.engine.name == "vllm":
        here = not config.vllm.servers and gpu_memory is not None
        return {"vLLM": int(config.vllm.memory * gpu_memory) if here and gpu_memory else 0}
    sharded = config.parallel.sharding == "full" and config.parallel.processes > 1
    return {
        "gathered weights": sizes.whole if sharded else 0,
        "keys and values": int(config.engine.kv_memory * GIB),
        "logits": 3 * config.engine.max_batch * shape.vocabulary * FLOAT32,
    }


def engine_itemsize(config: Config) -> int:
    """Bytes of a weight of the engine's, and of its keys and values."""
    return 2 if config.engine.name == "vllm" and config.precision == "bfloat16" else itemsize(config)


def kv_bytes(config: Config, shape: Shape) -> int:
    """Keys and values of one token."""
    return 2 * shape.layers * shape.keys * engine_itemsize(config)


def vllm_least(config: Config, shape: Shape) -> int:
    """What vLLM needs of a GPU to generate one rollout: all weights, keys and values of the longest, and room."""
    weights = shape.parameters * engine_itemsize(config)
    return weights + config.rollout.max_context * kv_bytes(config, shape) + VLLM_WORK


def host_bytes(config: Config, shape: Shape, tuning: bool = False) -> int:
    """Memory of the host that all processes take together. On the CPU the device's memory comes on top.

    Every process opens the whole checkpoint before it goes to its GPU; later what is offloaded lies there, and the
    gradients that it is stepped with. One process gathers weights and optimizer to save them.
    """
    sizes, processes = Sizes.of(config, shape, tuning), config.parallel.processes
    away = sizes.optimizer + sizes.gradients + sizes.reference if config.parallel.offload else 0
    shares = processes if config.parallel.sharding == "full" else 1
    gather = sizes.whole + (0 if config.parallel.offload or tuning else shares * sizes.optimizer)
    loading = sizes.whole if config.device.startswith("cuda") else 0
    return processes * (PROCESS + max(loading, away)) + gather
