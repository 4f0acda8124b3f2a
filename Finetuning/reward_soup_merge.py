"""Rewarded Soups: average single-objective policies' parameters into one adapter (Rame et al. 2023).

    python Finetuning/reward_soup_merge.py --dataset anthropic --objectives help harm --weights 0.4 0.6
    python Finetuning/reward_soup_merge.py --adapters A B C --weights 0.2 0.3 0.5 --output_dir D

The merged adapter's full matrices are the weighted average of the adapters' (utils/soups.py), so its rank is the sum of
theirs. With --objectives the adapters are the workspace's morlhf/<data set>/single/<objective> and the result is
reward_soup/<data set>/<pair>/reward_soup_<weight of the first>. Seconds on a CPU; no base model is loaded.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import rivals
from utils.cli import add_common, config_from, found, objectives_of, report_dry_run, run
from utils.errors import DataError, UsageError
from utils.files import hold, is_made, lets_go, whole_folder
from utils.places import check_adapter_folder, record_checksum


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is averaged")
    group.add_argument("--dataset", default="anthropic", help="data set of --objectives (default: %(default)s)")
    group.add_argument("--objectives", nargs="+", default=[], help="average these objectives' single policies")
    group.add_argument("--adapters", nargs="+", default=[], metavar="DIR", help="average these adapters instead")
    group.add_argument(
        "--weights", nargs="+", type=float, required=True, metavar="W", help="a weight for each; they sum to 1"
    )
    group.add_argument("--output_dir", help="folder of the merged adapter (needed with --adapters)")
    group.add_argument("--rerun", action="store_true", help="merge again where another merged adapter is")
    add_common(parser)
    return parser


def check_weights(weights: list[float], count: int) -> None:
    """Raise a UsageError unless there is a weight for each adapter, not negative, with sum 1."""
    if len(weights) != count:
        raise UsageError(f"--weights has {len(weights)} numbers for {count} adapters")
    if any(not math.isfinite(w) or w < 0 for w in weights):
        raise UsageError(f"--weights must be finite and not negative, got {weights}")
    if abs(sum(weights) - 1.0) > 1e-6:
        raise UsageError(f"--weights sum to {sum(weights):g}; they must sum to 1")


def plan(args, config) -> tuple[dict[Path, str], list[float], Path, dict]:
    """The adapters {folder: the command that makes it}, their weights, the output's folder, and what they are for."""
    if bool(args.objectives) == bool(args.adapters):
        raise UsageError("give either --objectives or --adapters")
    check_weights(args.weights, len(args.objectives or args.adapters))
    if args.adapters:
        if not args.output_dir:
            raise UsageError("--adapters needs --output_dir")
        if len(set(map(Path, args.adapters))) < len(args.adapters):
            raise UsageError("--adapters names a folder twice; add up its weights")
        return dict.fromkeys(map(Path, args.adapters), ""), args.weights, Path(args.output_dir), {}
    dataset = config.dataset(args.dataset)
    names = objectives_of(dataset, ",".join(args.objectives))
    if len(set(names)) < len(names):
        raise UsageError(f"--objectives names one of {', '.join(names)} twice")
    given = dict(zip(names, args.weights, strict=True))
    weights = {n: given[n] for n in dataset.objectives if n in given}  # in the data set's order
    folders = {}
    for name in weights:
        folder = rivals.single_folder(config, dataset, name)
        folders[folder] = rivals.ppo_command(config, dataset, {name: 1.0}, folder)
    output = Path(args.output_dir) if args.output_dir else rivals.soup_folder(config, dataset, weights)
    return folders, list(weights.values()), output, {"dataset": dataset.name, "weights": weights}


def write_adapter(output: Path, adapter_config: dict, tensors: dict, record: dict) -> None:
    """The adapter and its record, in a folder that appears whole or not at all."""
    from safetensors.torch import save_file

    with whole_folder(output) as part:
        (part / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / rivals.RECORD).write_text(json.dumps(record, indent=2) + "\n")
        record_checksum(part)


@lets_go
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    folders, weights, output, purpose = plan(args, config)
    if args.dry_run:
        rows = [
            (f"adapter, weight {w:g}", str(f), found(str(f), by))
            for (f, by), w in zip(folders.items(), weights, strict=True)
        ]
        report_dry_run([*rows, ("merged adapter", str(output), "here" if output.exists() else "would be made")])
        return 0

    from utils import soups
    from utils.provenance import fingerprint

    for folder, made_by in folders.items():
        check_adapter_folder(folder, "adapter", made_by)
    records = [rivals.read_record(folder) for folder in folders]
    bases = {r["base_content"]: r.get("base_model") for r in records if "base_content" in r}
    if len(bases) > 1:
        raise DataError(f"the adapters were trained on different bases: {', '.join(map(str, bases.values()))}")
    made_from = {str(f): [fingerprint(f), w] for f, w in zip(folders, weights, strict=True)}
    hold(output)
    known = rivals.read_record(output).get("made_from")
    if is_made(output, known, made_from, rerun=args.rerun, what="merged adapter", option="--output_dir"):
        print(f"the merged adapter is complete: {output} (--rerun makes it again)")
        return 0
    adapter_config, tensors = soups.average_adapters([soups.read_adapter(f) for f in folders], weights)
    record = {**purpose, "kind": "reward_soup", "made_from": made_from}
    for content, name in bases.items():
        record |= {"base_content": content, "base_model": name}
    write_adapter(output, adapter_config, tensors, record)
    print(f"merged adapter: {output} (rank {adapter_config['r']}, {len(tensors) // 2} modules)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
