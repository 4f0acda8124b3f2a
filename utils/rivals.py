"""The trained baselines: where their policies lie, and the evaluation method of each.

    <workspace>/morlhf/<data set>/single/<objective>                   one policy per objective (PPO)
    <workspace>/morlhf/<data set>/<pair>/morlhf_<w>                    one policy per weighting (MORLHF)
    <workspace>/reward_soup/<data set>/<pair>/reward_soup_<w>          averaged single policies (Rewarded Soups)
    <workspace>/arm/<data set>/<objective>                             autoregressive reward models

A pair is `help_harm`, in the data set's order, and w the weight of its first objective (of all but the last where
there are more than two); a weighting of one objective alone is that objective's single policy. All are PEFT adapters on
the reference. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.errors import DataError
from utils.files import read_json
from utils.places import RECORD, check_adapter_folder, reference_path
from utils.provenance import fingerprint
from utils.specs import Config, DatasetSpec
from utils.summaries import describe_weights

# A weighting of one objective alone is the same policy for all three methods: one run, which is an end of each front.
SINGLE_POLICY = "single_policy"
MIXED_FROM_SINGLE = ("morlhf", "rewarded_soup", "mod")

# -------------------------------------------------------------------------------------------------------------- places


def pair_of(weights: Mapping[str, float]) -> tuple[str, str]:
    """(`help_harm`, `0.4`): the names in a tree of policies for weights in the data set's order."""
    return "_".join(weights), "_".join(f"{w:g}" for w in list(weights.values())[:-1])


def single_folder(config: Config, dataset: DatasetSpec, objective: str, root: str | Path | None = None) -> Path:
    """The policy of one objective; `root` replaces morlhf/<data set>/single."""
    return Path(root or config.default_path("morlhf", dataset.name, "single")) / objective


def morlhf_folder(
    config: Config, dataset: DatasetSpec, weights: Mapping[str, float], root: str | Path | None = None
) -> Path:
    """The policy that was trained on these weights; `root` replaces morlhf/<data set>."""
    root = Path(root or config.default_path("morlhf", dataset.name))
    if len(weights) == 1:
        return root / "single" / next(iter(weights))
    pair, w = pair_of(weights)
    return root / pair / f"morlhf_{w}"


def soup_folder(
    config: Config, dataset: DatasetSpec, weights: Mapping[str, float], root: str | Path | None = None
) -> Path:
    """The average of the single policies with these weights; `root` replaces reward_soup/<data set>."""
    if len(weights) == 1 and root is None:
        return single_folder(config, dataset, next(iter(weights)))
    pair, w = pair_of(weights)
    return Path(root or config.default_path("reward_soup", dataset.name)) / pair / f"reward_soup_{w or '1'}"


def arm_folder(config: Config, dataset: DatasetSpec, objective: str, root: str | Path | None = None) -> Path:
    """The autoregressive reward model of an objective; `root` replaces arm/<data set>."""
    return Path(root or config.default_path("arm", dataset.name)) / objective


# ------------------------------------------------------------------------------------------ the commands that make them


def ppo_command(config: Config, dataset: DatasetSpec, weights: Mapping[str, float], folder: str | Path) -> str:
    names, values = " ".join(weights), " ".join(f"{w:g}" for w in weights.values())
    return (
        f"python Finetuning/PPO/ppo.py {config.flags} --exp_type {dataset.exp_type} --reward_models {names} "
        f"--reward_weights {values} --output_dir {shlex.quote(str(folder))}"
    )


def soup_command(config: Config, dataset: DatasetSpec, weights: Mapping[str, float], folder: str | Path) -> str:
    names, values = " ".join(weights), " ".join(f"{w:g}" for w in weights.values())
    return (
        f"python Finetuning/reward_soup_merge.py {config.flags} --dataset {dataset.name} --objectives {names} "
        f"--weights {values} --output_dir {shlex.quote(str(folder))}"
    )


def arm_command(config: Config, dataset: DatasetSpec, objective: str, folder: str | Path) -> str:
    return (
        f"python Finetuning/ARM/train_arm.py {config.flags} --dataset {dataset.name} --objective {objective} "
        f"--output_dir {shlex.quote(str(folder))}"
    )


# ------------------------------------------------------------------------------------------------------------- checks


def read_record(folder: str | Path) -> dict:
    """What a script of the project wrote beside an adapter; {} for an adapter from elsewhere."""
    return read_json(Path(folder) / RECORD) or {}


def check_policy_adapter(folder: str | Path, what: str, made_by: str, base: str | Path) -> None:
    """Refuse what is no adapter, or one that says that it was trained on another base than `base`.

    Raises:
        DataError: where it was looked for and the command that makes it, or which base it belongs to.
    """
    check_adapter_folder(Path(folder), what, made_by)
    record = read_record(folder)
    if record.get("base_content") not in (None, fingerprint(base)):
        raise DataError(
            f"{what}: the adapter in {folder} was trained on another base ({record.get('base_model')}) than {base}; "
            f"make it again with: {made_by}"
        )


# ------------------------------------------------------------------------------------------------- evaluation methods
# Each baseline gives its checkpoints, {what: (folder, the command that makes it)}, and a policy of adapters on the
# reference. They are off but in a policy's own calls, so the reference stays the reference.


def is_single(settings, root: str | None) -> bool:
    """Whether a point is an objective's own policy, whichever method asks; in a given `root` it stays that method's."""
    return len(settings.weights) == 1 and not root


def soup_checkpoints(settings, root: str | None) -> dict[str, tuple[str, str]]:
    config, spec, weights = settings.config, settings.spec, settings.weights
    if is_single(settings, root):
        return mod_checkpoints(settings, root)
    folder = soup_folder(config, spec, weights, root or None)
    return {f"rewarded soup of {describe_weights(weights)}": (str(folder), soup_command(config, spec, weights, folder))}


def morlhf_checkpoints(settings, root: str | None) -> dict[str, tuple[str, str]]:
    config, spec, weights = settings.config, settings.spec, settings.weights
    if is_single(settings, root):
        return mod_checkpoints(settings, root)
    folder = morlhf_folder(config, spec, weights, root or None)
    return {f"MORLHF policy of {describe_weights(weights)}": (str(folder), ppo_command(config, spec, weights, folder))}


def mod_checkpoints(settings, root: str | None) -> dict[str, tuple[str, str]]:
    config, spec = settings.config, settings.spec
    folders = {name: single_folder(config, spec, name, root or None) for name in settings.weights}
    return {f"policy of {n}": (str(f), ppo_command(config, spec, {n: 1.0}, f)) for n, f in folders.items()}


def arm_checkpoints(settings, root: str | None) -> dict[str, tuple[str, str]]:
    config, spec = settings.config, settings.spec
    folders = {name: arm_folder(config, spec, name, root or None) for name in settings.weights}
    return {
        f"autoregressive reward model of {n}": (str(f), arm_command(config, spec, n, f)) for n, f in folders.items()
    }


def load_adapters(settings, reference, checkpoints: Mapping[str, tuple[str, str]]) -> list:
    """The checkpoints' policies as adapters on the reference, in their order."""
    from utils.adapters import load_policies

    base, _ = reference_path(settings.config, settings.spec)
    for what, (folder, made_by) in checkpoints.items():
        check_policy_adapter(folder, what, made_by, base)
    return list(load_policies(reference, {what: folder for what, (folder, _) in checkpoints.items()}).values())


def mixture(settings, reference, checkpoints: Mapping[str, tuple[str, str]], weights: Sequence[float]):
    """The policy of one adapter, or MOD's of several."""
    from utils.policies import MixturePolicy

    models = load_adapters(settings, reference, checkpoints)
    return MixturePolicy(models, weights, top_k=settings.top_k, temperature=settings.temperature)


def reward_guided(settings, reference, checkpoints: Mapping[str, tuple[str, str]], arm_beta: float):
    """GenARM's policy: the reference guided by autoregressive reward models."""
    from utils.policies import RewardGuidedPolicy

    return RewardGuidedPolicy(
        reference,
        load_adapters(settings, reference, checkpoints),
        list(settings.weights.values()),
        arm_beta=arm_beta,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )
