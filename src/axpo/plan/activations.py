"""The memory of one update's forward and backward, from what autograd keeps of each layer.

The terms count what the layers of Qwen3 and Qwen3-VL save for the backward pass, in numbers a token: H is the hidden
size, Q and K are query and key heads times head_dim, I is the MLP's width. `e` is the bytes of a number of the dtype.
Each is checked against the real layers, saved tensor by saved tensor (tests/plan/test_activations.py).
"""

from dataclasses import dataclass

from axpo.logprobs import ROWS
from axpo.plan.shapes import Shape, Vision

FLOAT32 = 4


@dataclass(frozen=True)
class Compute:
    """How an update computes. `weight` is the bytes of a weight; under `autocast` products are in bfloat16."""

    weight: int = FLOAT32
    autocast: bool = False
    checkpointing: bool = False
    vision: bool = True  # the vision tower is trained
    rank: int = 0  # of adapters; 0: all weights are trained

    @property
    def product(self) -> int:
        """Bytes of a number that a matrix product gives."""
        return 2 if self.autocast else self.weight


@dataclass(frozen=True)
class Batch:
    """One packed forward: its tokens, those among them that are trained, and the patches of its images."""

    tokens: int
    trained: int
    patches: int = 0


@dataclass(frozen=True)
class Activations:
    """Bytes. `saved` lives from forward to backward; `working` comes on top while a layer goes backward, `head` while
    the logits do, not both at once."""

    saved: int
    working: int
    head: int


def activations(shape: Shape, batch: Batch, compute: Compute) -> Activations:
    """What one packed forward and backward takes besides weights, gradients and the like."""
    layer, kept = layer_bytes(shape, compute), shape.hidden * compute.weight
    tower = _tower(shape.vision, batch.patches, compute) if shape.vision and batch.patches else Activations(0, 0, 0)
    # Outside the layers: cosines and sines, the final norm as in a layer, the rows that the head reads.
    outside = batch.tokens * (2 * shape.head_dim * compute.weight + _norm_bytes(shape.hidden, compute))
    outside += batch.trained * shape.hidden * compute.product
    outside += _cast_bytes(shape, compute)
    layers = shape.layers * (kept if compute.checkpointing else layer)
    again = layer if compute.checkpointing else 0  # one layer is computed again
    embeddings = shape.vocabulary * shape.hidden * compute.weight
    trained = compute.rank == 0
    working = batch.tokens * (again + mlp_backward_bytes(shape, compute))
    if trained:  # one weight's gradient before it is added; of tied embeddings the head's share waits for the end
        working += shape.hidden * shape.intermediate * compute.weight + shape.tied * embeddings
    return Activations(
        saved=batch.tokens * layers + outside + tower.saved,
        working=max(working, tower.working),
        head=head_bytes(shape, batch.trained, compute),
    )


def layer_bytes(shape: Shape, compute: Compute) -> int:
    """Bytes a token that one layer of the language model saves.

    Two norms of H, one of Q and one of K (before the rotary positions), and what they give to the products of H; the
    rotated query and key, the value, attention's output and its log-sum-exps; gate, its SiLU, up and their product.
    A frozen product saves nothing, but an adapter on it saves the same, and the few numbers between its two matrices.
    """
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    e = compute.product
    norms = 2 * _norm_bytes(h, compute) + _norm_bytes(q, compute, False) + _norm_bytes(k, compute, False)
    norms += FLOAT32 * (2 + shape.heads + shape.key_heads)  # the reciprocal roots
    attention = (2 * q + 2 * k) * e + FLOAT32 * shape.heads
    read = (2 * h + i + 7 * compute.rank) * e  # attention's output, which the next product reads too, counts above
    return norms + attention + read + 3 * i * e


def _norm_bytes(width: int, compute: Compute, first: bool = True) -> int:
    """An RMSNorm: its input in float32, and, where its weight is trained, what that multiplies."""
    normed = (FLOAT32 if first else 2) if compute.autocast else compute.weight
    return width * (FLOAT32 + (normed if not compute.rank else 0))


def _cast_bytes(shape: Shape, compute: Compute) -> int:
    """The bfloat16 copies of float32 weights that autocast makes: of all layers, or of one if they are computed again,
    and of the head."""
    if not compute.autocast:
        return 0
    layers = shape.layer_parameters if compute.checkpointing else shape.language_parameters
    tower = 0 if compute.checkpointing or not compute.vision else shape.vision_parameters
    return 2 * (layers + tower + shape.vocabulary * shape.hidden)


def mlp_backward_bytes(shape: Shape, compute: Compute) -> int:
    """Bytes a token in the middle of the MLP's backward, over what was saved: the gradients of its output, of the
    product of gate and up, and of both of these; the product itself has gone."""
    return (shape.hidden + 2 * shape.intermediate) * compute.product


def head_bytes(shape: Shape, trained: int, compute: Compute) -> int:
    """Bytes while the head goes backward (logprobs.py): a chunk's logits three times in float32, the gradient of its
    input and, where its weight is trained, that weight's in float32 with one chunk's share of it."""
    rows, v, h, e = min(ROWS, trained), shape.vocabulary, shape.hidden, compute.product
    chunk = 3 * rows * v * FLOAT32
    gradient = trained * h * e
    if compute.rank:
        return gradient + chunk
    return gradient + v * h * FLOAT32 + max(chunk, rows * v * e + v * h * e)


def _tower(vision: Vision, patches: int, compute: Compute) -> Activations:
    """The vision tower. Where it is not trained nothing is saved, and what it needs for the moment is less than the
    language model needs later."""
    if not compute.vision:
        return Activations(0, 0, 0)
    block, kept = vision_block_bytes(vision, compute), vision.hidden * compute.weight
    merger = (3 * vision.hidden + vision.out // vision.merge**2) * compute.product
    pixels = vision.patch_values * compute.weight
    saved = pixels + vision.mergers * merger + vision.depth * (kept if compute.checkpointing else block)
    again = block if compute.checkpointing else 0
    return Activations(patches * saved, patches * (again + 2 * vision.intermediate * compute.product), 0)


def vision_block_bytes(vision: Vision, compute: Compute) -> int:
    """Bytes a patch that one block saves: both norms' inputs and outputs, query, key and value in one (kept whole for
    the value), the rotated query and key, attention's output twice; the MLP's two. Autocast keeps what goes into the
    norms in float32."""
    norms = 2 * vision.hidden * compute.weight
    return norms + (9 * vision.hidden + 2 * vision.intermediate) * compute.product
