"""An evaluation's command line: its arguments, and what they come to for each point that they name.

A *point* is one trade-off: weights, and for a tilted policy a beta. `resolve` gives one `Settings` per point, weights
by betas; what does not differ between points is the same in all of them. Nothing heavy is imported here.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

from utils.cli import add_common, add_graphs_argument, check_beta, check_graphs, config_from, parse_front, parse_weights
from utils.errors import UsageError, nearest
from utils.specs import NORMALIZATIONS, Config, DatasetSpec

# Decoding of the published versions. Without normalisation v1 clips beta * value; v3 does not, and forbids an empty
# answer.
PRESETS = {
    "v1": {"top_k": 15, "normalization": "minmax", "clip_values": True, "suppress_first_eos": False},
    "v3": {"top_k": 40, "normalization": "none", "clip_values": False, "suppress_first_eos": True},
}
# What a script lacks that decodes nothing.
OF_DECODING = (
    "front", "points", "prompt", "preset", "topk", "suppress_first_eos", "max_new_tokens", "batch_size", "cuda_graphs",
)  # fmt: skip


def add_evaluation_arguments(parser: ArgumentParser, *, track_kl: bool = True, decodes: bool = True) -> None:
    """The arguments that all evaluation scripts share.

    Args:
        track_kl: whether --track_KL is one.
        decodes: whether those are that say how answers are decoded, and for how many points.
    """
    task = parser.add_argument_group("what is evaluated")
    task.add_argument("--dataset", required=True, help="data set of the configuration, e.g. anthropic")
    task.add_argument(
        "--obj_weights",
        action="append",
        metavar="WEIGHTS",
        help="weights in the data set's order of objectives, e.g. 0.2,,0.8 (they sum to 1)"
        + ("; may be repeated, for several points from one load of the models" if decodes else ""),
    )
    decoding = parser.add_argument_group("decoding" if decodes else "the answers")
    if decodes:
        _add_points(task)
        _add_decoding(decoding)
    else:
        parser.set_defaults(**dict.fromkeys(OF_DECODING))
    whose = "the configuration's" if decodes else "the file's"
    task.add_argument("--data_split", default="test", help="split whose prompts are answered (default: test)")
    task.add_argument("--num_prompts", type=int, help="number of prompts (default: the configuration's)")
    task.add_argument("--start_index", type=int, default=0, help="index of the first prompt (default: 0)")
    task.add_argument("--num_trials", type=int, help=f"answers per prompt (default: {whose})")
    decoding.add_argument(
        "--temperature", type=float, help="divides the reference's logits (default: the configuration's)"
    )
    decoding.add_argument("--seed", type=int, help="seed of the sampling (default: the configuration's)")
    record = parser.add_argument_group("record")
    if track_kl:
        record.add_argument(
            "--track_KL",
            action=BooleanOptionalAction,
            default=True,
            help="write each answer's log-ratio to the reference, whose mean estimates the KL (default: on)",
        )
    else:
        parser.set_defaults(track_KL=False)
    record.add_argument("--rerun", action="store_true", help="start anew where the same run is already complete")
    add_common(parser)


def _add_points(task) -> None:
    """Several points, and the user's own texts."""
    task.add_argument(
        "--front",
        metavar="A,B",
        help="instead of --obj_weights: points that are evenly spaced between two objectives, e.g. help,harm; all: of "
        "every pair of the data set's",
    )
    task.add_argument("--points", type=int, help="points of each --front, both ends included (default: 6)")
    task.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="answer this text of yours (- reads it from standard input) at each point and write no run folder; may be "
        "repeated",
    )


def _add_decoding(decoding) -> None:
    """How answers are decoded."""
    decoding.add_argument(
        "--preset",
        metavar="{" + ",".join(PRESETS) + "}",
        help="decoding of a published version: v1 (k 15, min-max) or v3 (k 40, values as they are, unclipped, no empty "
        "answer); other flags win over it",
    )
    decoding.add_argument("--topk", type=int, help="candidates kept per step (default: the configuration's)")
    decoding.add_argument(
        "--suppress_first_eos",
        action=BooleanOptionalAction,
        help="forbid the end-of-sequence token as the first new token (default: off; v3: on)",
    )
    decoding.add_argument("--max_new_tokens", type=int, help="longest answer in tokens (default: the data set's)")
    decoding.add_argument("--batch_size", type=int, help="sequences decoded together (default: the configuration's)")
    add_graphs_argument(decoding)


def add_tilt_arguments(parser: ArgumentParser, title: str, *, kl_budget: bool = True) -> None:
    """How values tilt the reference; `kl_budget` says whether --kl_budget is an argument (it needs a log-ratio)."""
    group = parser.add_argument_group(title)
    group.add_argument(
        "--beta",
        type=float,
        nargs="+",
        help="strength of the tilt, at least 0 (0 is the reference); several numbers give a point each",
    )
    if kl_budget:
        group.add_argument(
            "--kl_budget",
            type=float,
            metavar="NATS",
            help="instead of --beta: find the beta whose KL meets this number, by bisection on one answer per prompt",
        )
    group.add_argument(
        "--normalization",
        metavar="{" + ",".join(NORMALIZATIONS) + "}",
        help="of values over a step's candidates (default: the configuration's)",
    )
    group.add_argument(
        "--normalize_values",
        action=BooleanOptionalAction,
        help="--no-normalize_values is --normalization none; --normalize_values the configuration's, or minmax",
    )
    group.add_argument(
        "--clip_values",
        action=BooleanOptionalAction,
        help="without normalisation: beta times a value is at most 6 (default: on; v3: off)",
    )


@dataclass(frozen=True)
class Settings:
    """A point's evaluation arguments, resolved against the configuration. Points differ in `weights` and `beta` alone.

    `beta` is None for a policy that is not tilted, and where a beta is still to be found that meets `kl_budget` (nats).
    """

    config: Config
    spec: DatasetSpec
    weights: dict[str, float]
    split: str
    num_prompts: int
    num_prompts_given: bool
    start_index: int
    num_trials: int
    top_k: int
    temperature: float
    max_new_tokens: int
    seed: int
    batch_size: int
    track_kl: bool
    rerun: bool
    device: str | None
    wandb: bool
    dry_run: bool
    texts: tuple[str, ...] = ()
    beta: float | None = None
    kl_budget: float | None = None
    normalization: str = "minmax"
    clip_values: bool = True
    suppress_first_eos: bool = False
    cuda_graphs: bool | None = None  # None: as the configuration says, where there is a GPU

    @property
    def tilted(self) -> bool:
        """Whether the command line says how strong a tilt is."""
        return self.beta is not None or self.kl_budget is not None

    @property
    def tilt(self) -> dict:
        """What every tilted policy takes, by its names."""
        from utils.tilting import CLIP

        return {
            "beta": self.beta,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "normalization": self.normalization,
            "clip": CLIP if self.clip_values else None,
        }

    @property
    def tilt_series(self) -> dict:
        """What a run's series says of the tilt. Clipping has no meaning with normalised values."""
        unclipped = {"clip_values": False} if self.normalization == "none" and not self.clip_values else {}
        return {"beta": self.beta, "normalization": self.normalization} | unclipped


def resolve(args: Namespace) -> list[Settings]:
    """The points that the command line names, defaults from the preset, then from the configuration.

    Raises:
        UsageError: a value that cannot be meant, before any folder or model is touched.
    """
    config = config_from(args)
    spec = config.dataset(args.dataset)
    check_graphs(args.cuda_graphs, args.device)
    if args.preset is not None and args.preset not in PRESETS:
        raise UsageError(f"--preset {args.preset!r}; {nearest(args.preset, PRESETS)}")
    preset = PRESETS.get(args.preset, {})

    def given(value, default):
        return default if value is None else value

    weights, betas = _weights(args, spec), _betas(args)
    normalization, clip_values = _normalization(args, config, preset)
    common = Settings(
        config=config,
        spec=spec,
        weights={},
        split=args.data_split,
        num_prompts=given(args.num_prompts, config.evaluation.num_prompts),
        num_prompts_given=args.num_prompts is not None,
        start_index=args.start_index,
        num_trials=given(args.num_trials, 1 if args.prompt else config.evaluation.num_trials),
        top_k=given(args.topk, preset.get("top_k", config.decoding.top_k)),
        temperature=given(args.temperature, config.decoding.temperature),
        max_new_tokens=given(args.max_new_tokens, spec.max_new_tokens),
        seed=given(args.seed, config.evaluation.seed),
        batch_size=given(args.batch_size, config.decoding.batch_size),
        track_kl=args.track_KL,
        rerun=args.rerun,
        device=args.device,
        wandb=args.wandb,
        dry_run=args.dry_run,
        texts=tuple(args.prompt or ()),
        kl_budget=getattr(args, "kl_budget", None),
        normalization=normalization,
        clip_values=clip_values,
        suppress_first_eos=given(args.suppress_first_eos, preset.get("suppress_first_eos", False)),
        cuda_graphs=args.cuda_graphs,
    )
    if common.split not in spec.splits:
        raise UsageError(f"--data_split {common.split!r} of {spec.name}; {nearest(common.split, spec.splits)}")
    for flag, value, least in (
        ("num_prompts", common.num_prompts, 1),
        ("start_index", common.start_index, 0),
        ("num_trials", common.num_trials, 1),
        ("topk", common.top_k, 1),
        ("max_new_tokens", common.max_new_tokens, 1),
        ("batch_size", common.batch_size, 1),
    ):
        if value < least:
            raise UsageError(f"--{flag} must be at least {least}, got {value}")
    if not (math.isfinite(common.temperature) and common.temperature > 0):
        raise UsageError(f"--temperature must be a finite number above 0, got {common.temperature}")
    return [replace(common, weights=w, beta=beta) for w in weights for beta in betas]


def _weights(args: Namespace, spec: DatasetSpec) -> list[dict[str, float]]:
    """The weights of each point; one point without weights where the command line names none."""
    if args.front is None:
        if args.points is not None:
            raise UsageError("--points says how many points --front has; give --front too")
        found = [parse_weights(text, spec.objectives) for text in args.obj_weights or ()]
    elif args.obj_weights is not None:
        raise UsageError("--front and --obj_weights both name the points; give one of them")
    else:
        found = parse_front(args.front, 6 if args.points is None else args.points, spec.objectives)
    _refuse_repeated("--obj_weights", found)
    return found or [{}]


def _betas(args: Namespace) -> list[float | None]:
    """The beta of each point; None where it is still to be found, or where the command line names none."""
    betas, budget = getattr(args, "beta", None), getattr(args, "kl_budget", None)
    if budget is not None:
        if betas is not None:
            raise UsageError("--beta and --kl_budget both say how strong the tilt is; give one of them")
        if not math.isfinite(budget) or budget <= 0:
            raise UsageError(f"--kl_budget must be a finite number of nats above 0, got {budget}")
        if args.prompt:
            raise UsageError("--kl_budget is met on the data set's prompts; give --beta with --prompt")
        if not args.track_KL:
            raise UsageError("--kl_budget needs the log-ratios that --no-track_KL leaves out")
        return [None]
    if betas is None:
        return [None]
    betas = [check_beta(beta) for beta in betas]
    _refuse_repeated("--beta", betas)
    return betas


def _refuse_repeated(flag: str, values: Sequence) -> None:
    repeated = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if repeated is not None:
        text = ", ".join(f"{n} {w:g}" for n, w in repeated.items()) if isinstance(repeated, dict) else f"{repeated:g}"
        raise UsageError(f"{flag} names the same point twice: {text}")


def _normalization(args: Namespace, config: Config, preset: dict) -> tuple[str, bool]:
    """(normalisation of values, whether values that are not normalised are clipped)."""
    chosen, switch, clip = (getattr(args, n, None) for n in ("normalization", "normalize_values", "clip_values"))
    if chosen is not None and chosen not in NORMALIZATIONS:
        raise UsageError(f"--normalization {chosen!r}; {nearest(chosen, NORMALIZATIONS)}")
    default = preset.get("normalization", config.decoding.normalization)
    if switch is not None:
        said = "--normalize_values" if switch else "--no-normalize_values"
        if chosen is not None and switch != (chosen != "none"):
            raise UsageError(f"--normalization {chosen} and {said} contradict each other; give one of them")
        on = next((n for n in (default, config.decoding.normalization) if n != "none"), "minmax")
        chosen = chosen or (on if switch else "none")
    chosen = chosen or default
    if clip is not None and chosen != "none":
        said = "--clip_values" if clip else "--no-clip_values"
        raise UsageError(f"{said} has a meaning for values as they are alone; they are normalised ({chosen})")
    return chosen, preset.get("clip_values", True) if clip is None else clip
