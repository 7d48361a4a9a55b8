"""How a served teacher is asked for log-probs at tokens that differ from position to position.

A server sends its own top-K of every position (compact), or one list of tokens at every position (nested JSON). So
the student's choice of tokens, or those of other teachers, take one of three routes:

    whole        top-V: the whole distribution, exact, V entries a position
    listed       top-K, then the missing tokens in a second request, a piece of `piece` positions at a time, so that
                 one list has at most `piece` * J tokens; exact; a prefill (from the prefix cache) for every piece. Its
                 length is the cheapest one that was measured
    larger_topk  a larger top-K; tokens that are not in it are left out of the support, and counted

The bytes of an entry are those of SGLang 0.5.23 (`benchmarks/transport.py`). `auto` takes the exact route that is
cheaper: `whole` if it stays within `objective.route_bytes_per_token`, else `listed` if a piece can have
`_SMALLEST_PIECE` positions. It never takes `larger_topk`, whose gradient is off by tens of percent where it leaves out
little of the teacher's mass (`benchmarks/routes.py`): a token that the teacher finds unlikely is what a reverse KL is
about. A recipe may ask for it, and gets as many entries as fit. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.schema import MEANS, Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.losses.settings import LISTED_SUPPORTS, LossSettings
from opd_megatron.serving.batching import BYTES_PER_TOKEN, BYTES_PER_TOPK_ENTRY
from opd_megatron.teacher.choice import members

# Of an answer to listed tokens, nested JSON.
BYTES_PER_LISTED_ENTRY = 30
# Below it every position is a request of its own.
_SMALLEST_PIECE = 2
_LARGEST_PIECE = 64
# Entries of one list beyond which a larger piece costs more (to send and read) than it saves (requests); measured on a
# CPU, docs/decisions/0022-routes-for-other-tokens.md.
_BEST_ENTRIES = 128


@dataclass(frozen=True)
class Route:
    """`kind` is "topk" where one request for the teacher's own choice is all that is needed.

    topk: K of the first request. piece: positions of one second request, 0 for none. bytes_per_token: of all answers
    of one teacher, an upper bound.
    """

    kind: str
    topk: int
    piece: int
    bytes_per_token: int

    @property
    def is_exact(self) -> bool:
        return self.kind != "larger_topk"

    def describe(self) -> str:
        words = {
            "topk": f"top-{self.topk} in one request",
            "whole": f"the whole vocabulary in one request, {self.topk} entries a token",
            "listed": f"top-{self.topk}, then listed tokens for {self.piece} positions a request",
            "larger_topk": f"top-{self.topk} in one request; tokens beyond it are left out and counted",
        }
        exact = "exact" if self.is_exact else "exact on what is scored"
        return f"{words[self.kind]}; {exact}, at most {self.bytes_per_token} bytes a token"


def _topk_bytes(topk: int) -> int:
    return BYTES_PER_TOKEN + BYTES_PER_TOPK_ENTRY * topk


def choose_route(
    vocab_size: int, topk: int, wanted: int, bytes_per_token: int, name: str = "auto"
) -> Route:
    """The route for `wanted` further tokens a position beside the teacher's own top-K.

    Args:
        topk: K.
        wanted: tokens of a position that may be missing in it, an upper bound.
        bytes_per_token: budget of `auto`, of one teacher's answers.
        name: `auto`, or the route that a recipe wants.

    Raises:
        ConfigError: nothing fits into the budget.
    """
    own = _topk_bytes(min(topk, vocab_size))
    if wanted == 0 or topk >= vocab_size:
        return Route("topk", min(topk, vocab_size), 0, own)
    per_position = BYTES_PER_LISTED_ENTRY * wanted
    cheapest = max(_SMALLEST_PIECE, _BEST_ENTRIES // wanted)
    piece = min(_LARGEST_PIECE, cheapest, (bytes_per_token - own) // per_position)
    fitting = (bytes_per_token - BYTES_PER_TOKEN) // BYTES_PER_TOPK_ENTRY
    whole = Route("whole", vocab_size, 0, _topk_bytes(vocab_size))
    if name == "whole" or (name == "auto" and whole.bytes_per_token <= bytes_per_token):
        return whole
    if name == "listed" or (name == "auto" and piece >= _SMALLEST_PIECE):
        piece = max(1, piece)
        return Route("listed", topk, piece, own + per_position * piece)
    larger = min(vocab_size, fitting)
    if name == "larger_topk" and larger > topk:
        return Route("larger_topk", larger, 0, _topk_bytes(larger))
    needed = own + per_position * _SMALLEST_PIECE if name == "auto" else _topk_bytes(2 * topk)
    raise ConfigError.of(
        "objective.route_bytes_per_token",
        bytes_per_token,
        f"no {'exact route' if name == 'auto' else 'larger top-K'} fits it: {wanted} tokens a position beside the "
        f"teacher's own top-{topk}",
        f"raise it to {needed}, lower objective.topk, or set teachers.NAME.engine=in_process, which needs no route"
        + ("; objective.support_route=larger_topk leaves tokens out" if name == "auto" else ""),
    )


def route_of(recipe: Recipe, vocab_size: int) -> Route | None:
    """How the served teachers of a recipe are asked; None where there is none, or only sampled tokens are wanted.

    Raises:
        ConfigError: as `choose_route`.
    """
    settings, objective = LossSettings.of(recipe), recipe.objective
    if not recipe.served_teachers or recipe.is_supervised:
        return None
    joins = recipe.teaching.kind in MEANS or recipe.teaching.kind == "soft_switch"
    # The members of a mean are of one engine; those inside the learner ask no server.
    is_mean = joins and members(recipe)[0] in recipe.served_teachers
    mean = recipe.teaching.kind if recipe.teaching.kind in MEANS else recipe.teaching.mean
    topk = settings.teacher_topk
    if topk == 0 and is_mean and mean == "geometric_mean":
        topk = objective.topk  # for its normaliser
    if topk == 0:
        return None
    others = 1 if recipe.teaching.kind == "soft_switch" else len(members(recipe)) - 1
    wanted = topk * others if is_mean else 0
    if settings.has_support and objective.support in LISTED_SUPPORTS:
        wanted += topk
    return choose_route(
        vocab_size, topk, wanted, objective.route_bytes_per_token, objective.support_route
    )
