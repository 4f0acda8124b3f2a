"""Merge sft.py's LoRA adapter into its base: the reference model of a data set, with the tokenizer beside it.

    python Finetuning/SFT/merge_sft_lora.py --exp_type assistant --lora_name sft_lora/assistant

Writes <workspace>/sft_model/<data set>, where every later stage looks for it. Runs on the CPU; a 7B model takes about
a minute and 30 GB of memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import add_common, config_from, found, report_dry_run, run
from utils.errors import DataError, UsageError
from utils.files import hold, is_made, lets_go, read_json, whole_folder
from utils.specs import Config

RECORD = "merge.json"  # written last into the merged model's folder: what it was made from
DTYPES = ("auto", "float32", "bfloat16", "float16")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is merged")
    group.add_argument(
        "--lora_name", help="adapter: a folder, or a name below <workspace>/sft_lora (default: --exp_type's)"
    )
    group.add_argument("--exp_type", help="assistant or summary: the data set (default: the one the adapter records)")
    group.add_argument("--base_model_name", help="base model: folder or Hub name (default: the configuration's)")
    group.add_argument(
        "--output_dir",
        "--save_directory",
        dest="output_dir",
        help="folder of the merged model (default: <workspace>/sft_model/<data set>)",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="precision of the written weights (default: the base's own)"
    )
    group.add_argument("--rerun", action="store_true", help="replace the merged model that is there")
    add_common(parser)
    return parser


def find_adapter(args: Namespace, config: Config) -> Path:
    """The adapter's folder (in a dry run also where it would be).

    Raises:
        UsageError: neither --lora_name nor --exp_type says which.
        DataError: there is no such folder.
    """
    if not args.lora_name and not args.exp_type:
        raise UsageError("give --lora_name (the adapter's folder) or --exp_type (assistant, summary)")
    name = args.lora_name or config.dataset(args.exp_type).name
    folders = [Path(name), config.workspace / name, config.default_path("sft_lora", name)]
    if not args.lora_name:
        folders = folders[2:]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None and args.dry_run:
        return folders[-1]
    if folder is None:
        raise DataError(
            f"no adapter {', '.join(str(f) for f in folders)}; make it with: "
            f"python Finetuning/SFT/sft.py --exp_type {args.exp_type or 'assistant'} --save_directory <folder>"
        )
    return folder


def output_folder(args: Namespace, config: Config, recorded: dict, adapter: Path) -> Path:
    """Where the merged model goes.

    Raises:
        UsageError: no data set is named anywhere, or another one than the adapter was trained for.
    """
    name = config.dataset(args.exp_type).name if args.exp_type else recorded.get("dataset")
    if args.exp_type and recorded.get("dataset") not in (None, name):
        raise UsageError(f"--exp_type {args.exp_type}: the adapter {adapter} was trained for {recorded['dataset']}")
    if args.output_dir:
        return Path(args.output_dir).absolute()
    if name is None:
        raise UsageError(f"the adapter {adapter} does not record its data set; give --exp_type or --output_dir")
    return config.default_path("sft_model", name)


def write_model(folder: Path, model, tokenizer, made_from: dict) -> None:
    """Model, tokenizer and record, in a folder that appears whole or not at all."""
    with whole_folder(folder) as part:
        model.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        (part / RECORD).write_text(json.dumps(made_from, indent=1) + "\n")


@lets_go
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    from utils.provenance import fingerprint

    if args.base_model_name:
        given = dataclasses.replace(config.base_model, path=args.base_model_name, made_by="")
        config = dataclasses.replace(config, base_model=given)
    adapter = find_adapter(args, config)
    recorded = read_json(adapter / "settings.json") or {}
    output = output_folder(args, config, recorded, adapter)
    base = config.locate(config.base_model.path)
    if args.dry_run:
        rows = [
            ("base model", base, found(base, config.base_model.made_by)),
            (
                "adapter",
                str(adapter),
                found(adapter, f"python Finetuning/SFT/sft.py --exp_type {args.exp_type or '...'}"),
            ),
            ("merged model", str(output), "here" if output.exists() else "would be made"),
        ]
        report_dry_run(rows)
        return 0
    if recorded.get("base_content") not in (None, fingerprint(base)):
        raise DataError(
            f"the adapter {adapter} was trained on another base than {base} ({recorded['base_model']}); "
            "give --base_model_name, or train it again"
        )
    made_from = {"base": fingerprint(base), "adapter": fingerprint(adapter), "dtype": args.dtype}
    hold(output)
    known = read_json(output / RECORD)
    if is_made(output, known, made_from, rerun=args.rerun, what="merged model", option="--output_dir"):
        print(f"the merged model is complete: {output} (--rerun makes it again)")
        return 0

    import torch

    from utils import models
    from utils.adapters import merge_adapter
    from utils.tracking import Tracker

    cpu = torch.device("cpu")
    own = models.resolved_config(base).dtype or torch.float32
    dtype = own if args.dtype == "auto" else getattr(torch, args.dtype)
    torch.manual_seed(recorded.get("seed", 0))  # sft.py drew the embedding of an added token so
    model, tokenizer = models.load_base(config, cpu, torch.float32)
    model = merge_adapter(model, adapter).to(dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_model(output, model, tokenizer, made_from)
    with Tracker(args.wandb, "merge_sft_lora", output.name, made_from) as tracker:
        tracker.summary({"vocabulary": models.vocabulary_size(model)})
    print(f"merged model: {output} ({models.vocabulary_size(model):,} tokens, {str(dtype).removeprefix('torch.')})")
    dataset = recorded.get("dataset") or args.exp_type
    if dataset and Path(config.sft_path(config.dataset(dataset))).absolute() != output.absolute():
        print(f"note: {config.path} names another reference for {dataset}: {config.sft_path(config.dataset(dataset))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
