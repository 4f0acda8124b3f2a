"""What a configuration holds: frozen dataclasses, one for each part of the YAML file, with the published defaults.

A configuration is data. No code branches on its name or on a data set's name; adding a data set or an objective is
one entry in one YAML file. `utils.config.load_config` reads one.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import ConfigError, nearest

NORMALIZATIONS = ("minmax", "none", "zscore")  # of values over the candidates of a step


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter's shape (PEFT's names)."""

    r: int
    alpha: int
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSpec:
    """A pretrained model: `path` is a Hub name or a folder (see `Config.locate`)."""

    path: str
    num_layers: int | None = None  # keep the first N layers; None keeps all
    special_tokens: dict[str, str] = field(default_factory=dict)  # e.g. {pad_token: "[PAD]"}, added to the tokenizer
    lora: LoraSpec | None = None
    # How a value model reads a text: "last": the head on the last token's state, as published; "mean": the mean of the
    # head over the response's tokens (0 where there are none).
    pooling: str = "last"
    made_by: str = ""  # the command that makes `path`, for the error message when it is missing


@dataclass(frozen=True)
class SourceSpec:
    """Where rows of text come from: local files first (`files`, if they exist), else a data set of the Hub."""

    hub: str = ""
    hub_config: str | None = None
    hub_data_dir: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()  # paths, relative to $DATA_DIR (or to the workspace where it is not set)
    hash_range: tuple[float, float] = (0.0, 1.0)  # keep prompts whose hash lies in [low, high): disjoint splits


@dataclass(frozen=True)
class TreeSpec:
    """The shape of iteration 0's trees (published: 4 children, then 2, 5 layers)."""

    root_children: int = 4
    non_root_children: int = 2
    num_layers: int = 5
    num_prompts: int = 5000


@dataclass(frozen=True)
class TrainingSpec:
    """Value regression's hyperparameters; the defaults are the published ones."""

    num_epochs: int = 1
    batch_size: int = 16  # nodes per optimizer step
    lr: float = 2e-5
    weight_decay: float = 2e-3
    warmup_steps: int = 100
    bf16: bool = False
    packing: str = "node"  # "node": one path per example, as published; "tree": one pass over a tree's unique tokens
    deepest_fraction: float = 0.5  # share of each tree's deepest-level nodes that is trained on
    targets: str = "ends"  # "ends": a node's target at its last token, as published; "dense": at each of its tokens
    # Where the head starts: "mean": a new one predicts about the targets' mean; "ridge": the regression of the targets
    # on the states before training, after which num_epochs may be 0.
    head_start: str = "mean"
    standardize: bool = False  # train in units of the targets' standard deviation, so that lr means the same for all
    seed: int = 8888


@dataclass(frozen=True)
class SFTSpec:
    """Supervised fine-tuning's hyperparameters; the defaults are the published ones."""

    lora: LoraSpec = LoraSpec(64, 128, 0.05)
    lr: float = 1.4e-4
    batch_size: int = 1
    max_steps: int = 20_000
    num_samples: int = 5_000
    max_length: int = 512
    weight_decay: float = 0.01
    warmup_steps: int = 0
    bf16: bool = True
    seed: int = 8888


@dataclass(frozen=True)
class PPOSpec:
    """Reinforcement learning's hyperparameters (Finetuning/PPO/ppo.py); the defaults are the published ones where the
    paper names them (adapter, lr, batch, epochs, KL target and coefficient, gradient norm, top-k)."""

    lora: LoraSpec = LoraSpec(64, 128, 0.05)
    lr: float = 1e-5
    batch_size: int = 64  # answers per step, over all processes
    num_epochs: int = 2  # passes over the prompts
    num_prompts: int | None = None  # prompts of the training split; None takes all
    max_steps: int | None = None  # at most this many steps
    ppo_epochs: int = 4  # passes over each step's answers
    mini_batch_size: int = 16  # answers per optimizer step
    micro_batch_size: int = 8  # answers per forward pass: memory alone, it changes no result
    kl_coef: float = 0.1  # initial, then adaptive
    kl_target: float | None = 3.0  # nats per answer; None keeps the coefficient
    kl_horizon: float = 10_000.0  # answers
    clip_ratio: float = 0.2
    clip_value: float = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    max_grad_norm: float = 0.5
    top_k: int | None = None  # None: decoding.top_k
    num_generations: int = 4  # answers per prompt, of the algorithms that compare answers (rloo, grpo)
    seed: int = 8888


@dataclass(frozen=True)
class ArmSpec:
    """Hyperparameters of autoregressive reward models (Finetuning/ARM/train_arm.py)."""

    lora: LoraSpec = LoraSpec(8, 16, 0.05)
    lr: float = 5e-4
    batch_size: int = 32  # pairs per step
    num_epochs: int = 1
    reward_beta: float = 0.05  # multiplies the log-probabilities in the Bradley-Terry loss
    num_prompts: int = 5000  # prompts whose sampled answers are compared
    answers_per_prompt: int = 4
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    seed: int = 8888


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: its prompts, how they are shown to the reference, and the defaults of its stages."""

    name: str
    exp_type: str  # the name that Finetuning/ scripts use ("assistant", "summary")
    prompt_format: str  # a key of text_formats.FORMATS: how a row becomes a prompt
    reference_template: str  # what the reference reads; fields {prompt}, {user}
    splits: dict[str, SourceSpec]
    objectives: tuple[str, ...]
    max_new_tokens: int
    max_prompt_tokens: int
    min_prompt_tokens: int = 1
    max_post_chars: int | None = None  # exclusive bounds on the user's text, where the format has them
    min_post_chars: int | None = None
    num_val_prompts: int = 300
    sft_model: str = ""  # the reference; empty: sft_model/<name>
    sft: SFTSpec = SFTSpec()
    trees: TreeSpec = TreeSpec()
    training: TrainingSpec = TrainingSpec()
    ppo: PPOSpec = PPOSpec()
    arm: ArmSpec = ArmSpec()


@dataclass(frozen=True)
class RewardTrainingSpec:
    """How `train_reward_model.py` makes a reward model, where no published one is used."""

    kind: str  # "preference": rows with chosen and rejected; "labels": rows with a text and a 0/1 label
    source: SourceSpec
    holdout: SourceSpec
    head: str = "linear"  # "linear": frozen trunk, Bradley-Terry on averaged features; "full": fine-tune every layer
    num_layers: int | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_rows: int | None = None
    max_holdout_rows: int | None = None
    max_length: int = 512
    lr: float = 1e-4
    num_epochs: int = 1
    batch_size: int = 8
    l2: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class ObjectiveSpec:
    """One reward: a checkpoint (`path`) or a Python callable (`function`), and the text it is shown.

    `text` is a template with the fields {prompt} (the data set's prompt), {user} (the human's words in it), {shown}
    (what the reference read), {response}, {bos}, {eos}.
    """

    name: str
    kind: str  # "classifier": a sequence-classification checkpoint; "pooled": train_reward_model.py's linear head;
    #            "callable": package.module:function from (prompts, responses) to N numbers
    path: str = ""
    function: str = ""
    label: int = 0  # which logit of a classifier
    sign: float = 1.0
    text: str = "{prompt}{response}"
    max_length: int = 512
    description: str = ""
    training: RewardTrainingSpec | None = None
    deepest_fraction_continued: float | None = None  # value training with --init_checkpoint (published: 1.0 for harm)


@dataclass(frozen=True)
class DecodingSpec:
    """Decoding's defaults (published v1: temperature 1, k 15, min-max)."""

    temperature: float = 1.0
    top_k: int = 15
    normalization: str = "minmax"
    batch_size: int = 32
    cuda_graphs: bool = False  # on a GPU: a step is recorded once and launched whole


@dataclass(frozen=True)
class EvaluationSpec:
    """Evaluation's defaults: prompts from index 0 of the test split."""

    num_prompts: int = 100
    num_trials: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """Everything that stands behind the names; `workspace` is where the stages keep what they make."""

    path: Path
    workspace: Path
    base_model: ModelSpec
    value_model: ModelSpec
    datasets: dict[str, DatasetSpec]
    objectives: dict[str, ObjectiveSpec]
    decoding: DecodingSpec = DecodingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    cpu_dtype: str = "float32"  # of frozen models; "auto": bfloat16 where the hardware has it
    gpu_dtype: str = "bfloat16"
    label: str = ""  # printed in reports, so that a small world's results are not taken for another's
    flags: str = ""  # what names this configuration, and a workspace that was given, on a command line

    def dataset(self, name: str) -> DatasetSpec:
        """The data set of that name (or of that `exp_type`)."""
        for spec in self.datasets.values():
            if name in (spec.name, spec.exp_type):
                return spec
        raise ConfigError(f"unknown data set {name!r} in {self.path}; {nearest(name, self.datasets)}")

    def objective(self, name: str) -> ObjectiveSpec:
        if name not in self.objectives:
            raise ConfigError(f"unknown objective {name!r} in {self.path}; {nearest(name, self.objectives)}")
        return self.objectives[name]

    def locate(self, path: str) -> str:
        """A folder of the workspace if there is one of that name, else a local folder, else the name itself (Hub)."""
        if not os.path.isabs(path) and (self.workspace / path).exists():
            return str(self.workspace / path)
        return path

    def find(self, path: str | os.PathLike) -> Path:
        """A file or folder that the user names: as given, from where the user is, else below the workspace."""
        given = Path(path)
        return given if given.exists() or not (self.workspace / given).exists() else self.workspace / given

    def portable(self, path: str | os.PathLike) -> str:
        """A path as it is put on record: from the workspace on where it lies there, so that a workspace can move."""
        place, workspace = Path(path).resolve(), self.workspace.resolve()
        if not place.exists():  # a Hub name
            return str(path)
        return str(place.relative_to(workspace) if place.is_relative_to(workspace) else place)

    def default_path(self, *parts: str) -> Path:
        """Where a default artefact lies: below the workspace."""
        return self.workspace.joinpath(*parts)

    def sft_path(self, dataset: DatasetSpec) -> str:
        """The reference model of a data set, as a workspace path or a Hub name."""
        return self.locate(dataset.sft_model or f"sft_model/{dataset.name}")

    def as_dict(self) -> dict:
        """Plain data for args.yaml."""
        return {name: value for name, value in _plain(self).items() if name != "flags"}


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
