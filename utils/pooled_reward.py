"""Linear rewards on a frozen trunk: features of a response, the head's files, and its fit.

The feature of a response is the mean, over its tokens, of the trunk's RMS-normalised hidden states, the conversation
before it read but not averaged. A reward is a dot product with it. So any number of such rewards cost one forward pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from utils.cli import progress
from utils.errors import DataError
from utils.files import npy, read_npy, write_atomically
from utils.prefix_tree import ROW_TOKENS, read_rows

FORMAT = 1
CHUNK = 256  # texts whose features are kept together on disk
HEAD, SETTINGS = "head.safetensors", "head.json"
CHECKSUM = "checksum"  # of both files, in the second; not in what earlier versions wrote


@dataclass(frozen=True)
class PooledHead:
    """reward = weight . feature + bias.

    Attributes:
        weight: (H,) float32.
        empty_value: the reward of a response without tokens.
        trunk: path of the trunk as the configuration writes it (`Config.locate` finds it).
        fingerprint: of the trunk's weights, see `trunk_fingerprint`.
    """

    weight: np.ndarray
    bias: float
    empty_value: float
    trunk: str
    num_layers: int | None
    max_length: int
    fingerprint: str = ""

    def score(self, features: np.ndarray, empty: np.ndarray) -> np.ndarray:
        """Rewards (N,) float64 of features (N, H); `empty` (N,) marks responses without tokens."""
        rewards = features.astype(np.float64) @ self.weight.astype(np.float64) + self.bias
        return np.where(empty, self.empty_value, rewards)


def save_head(folder: str | Path, head: PooledHead) -> None:
    """Write a head's folder (or replace its two files): weights in safetensors, the rest in JSON, written last."""
    from safetensors.numpy import save

    weight = save({"weight": head.weight.astype(np.float32)})
    settings = {k: v for k, v in asdict(head).items() if k != "weight"} | {"format": FORMAT}
    settings[CHECKSUM] = _checksum(weight, settings)  # a kill between the two files, or a damaged byte, is noticed
    write_atomically(Path(folder) / HEAD, weight)
    write_atomically(Path(folder) / SETTINGS, json.dumps(settings, indent=1, sort_keys=True) + "\n")


def _checksum(weight: bytes, settings: dict) -> str:
    return hashlib.sha256(weight + json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load_head(folder: str | Path, objective: str, made_by: str = "") -> PooledHead:
    """Read a head's folder.

    Raises:
        DataError: it is missing, or does not hold such a head.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Path(folder)
    hint = f"; make it with: {made_by}" if made_by else ""
    if not (folder / SETTINGS).is_file():
        raise DataError(f"reward model of {objective}: no {SETTINGS} in {folder}{hint}")
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if settings["format"] != FORMAT:
            raise DataError(f"reward model of {objective}: {folder / SETTINGS} has another format than {FORMAT}{hint}")
        weight, checksum = (folder / HEAD).read_bytes(), settings.pop(CHECKSUM, None)
        if checksum not in (None, _checksum(weight, settings)):
            raise ValueError(f"{HEAD} and {SETTINGS} were not written together, or are damaged")
        head = PooledHead(weight=load(weight)["weight"], **{k: v for k, v in settings.items() if k != "format"})
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"reward model of {objective}: {folder} does not hold a pooled head ({error}){hint}") from error
    if head.weight.ndim != 1 or not np.isfinite(head.weight).all():
        raise DataError(f"reward model of {objective}: the weight in {folder / HEAD} is no finite vector{hint}")
    return head


def trunk_fingerprint(trunk) -> str:
    """A short name of a trunk's weights, so that a head is never put on another trunk."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(trunk.named_parameters()):
        sample = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)][:64]
        digest.update(name.encode() + sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ features


def encode_texts(
    tokenizer, before: Sequence[str], responses: Sequence[str], max_length: int
) -> list[tuple[list[int], int]]:
    """Token ids of each conversation with its response, and where the response starts.

    The two are tokenised apart, as in generation, where a response starts with a token of its own. What is longer than
    `max_length` loses the conversation's beginning first, down to half of the length, and then the response's end.
    """
    heads = tokenizer(list(before), add_special_tokens=False)["input_ids"] if before else []
    tails = tokenizer(list(responses), add_special_tokens=False)["input_ids"] if responses else []
    encoded = []
    for head, tail in zip(heads, tails, strict=True):
        keep = max(max_length - len(tail), max_length // 2)
        head = head[max(0, len(head) - keep) :]
        tail = tail[: max_length - len(head)]
        encoded.append((head + tail, len(head)))
    return encoded


def pooled_features(
    trunk,
    encoded: Sequence[tuple[list[int], int]],
    pad_id: int,
    *,
    batch_size: int = 32,
    token_budget: int = 8192,
    row_tokens: int = ROW_TOKENS,
    autocast: bool = False,
) -> np.ndarray:
    """Features (N, H) float32 of encoded responses; zeros for a response without tokens.

    What texts have in common from their beginning on, conversation and answer, is read once (`prefix_tree`): the sides
    of a pair share the conversation, the leaves of a tree also the path to where they fork.

    Args:
        trunk: headless causal model; its `last_hidden_state` is normalised to a mean square of 1 at each token.
        encoded: what `encode_texts` gives.
        batch_size, token_budget, row_tokens: as in `prefix_tree.read_rows`.
        autocast: run the trunk in bfloat16.
    """
    import torch

    device = next(trunk.parameters()).device
    features = np.zeros((len(encoded), trunk.config.hidden_size), np.float32)
    index = [i for i, (ids, start) in enumerate(encoded) if len(ids) > start]
    texts = [encoded[i][0] for i in index]
    sizes = {"batch_size": batch_size, "token_budget": token_budget, "row_tokens": row_tokens}
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for rows, hidden in read_rows(trunk, texts, pad_id, **sizes):
            hidden = hidden.float()
            hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)  # (B, L, H)
            members = [index[n] for row in rows for n in row.members]
            weights = np.zeros((len(members), hidden.shape[1]), np.float32)  # (m, L) of the means over responses
            for weight, i, path in zip(weights, members, (path for row in rows for path in row.paths), strict=True):
                response = path[encoded[i][1] :]
                weight[response] = 1 / len(response)
            weights = torch.as_tensor(weights, device=device).split([len(row.members) for row in rows])
            with torch.autocast(device.type, enabled=False):
                means = torch.cat([w @ states for w, states in zip(weights, hidden, strict=True)])  # (m, H)
            features[members] = means.cpu().numpy()
    return features


def cached_features(
    trunk, encoded, pad_id: int, cache_dir: str | Path, *, key: str, desc: str = "features", **options
) -> np.ndarray:
    """`pooled_features`, kept on disk in chunks that are named by what they were made from: a killed run goes on."""
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(encoded), CHUNK)
    chunks = []
    for start in progress(starts, desc=desc, unit="chunk"):
        rows = encoded[start : start + CHUNK]
        name = hashlib.sha256(json.dumps([FORMAT, key, sorted(options.items()), rows]).encode()).hexdigest()[:32]
        path = cache_dir / f"{name}.npy"
        chunk = _read_chunk(path, (len(rows), trunk.config.hidden_size))
        if chunk is None:
            chunk = pooled_features(trunk, rows, pad_id, **options)
            write_atomically(path, npy(chunk))
        chunks.append(chunk)
    return np.concatenate(chunks) if chunks else np.zeros((0, trunk.config.hidden_size), np.float32)


def _read_chunk(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        chunk = read_npy(path)
    except (OSError, ValueError):
        return None
    return chunk if chunk.shape == shape and np.isfinite(chunk).all() else None


# ----------------------------------------------------------------------------------------------------------------- fit


def fit_logistic(x: np.ndarray, y: np.ndarray, l2: float, intercept: bool) -> tuple[np.ndarray, float]:
    """Logistic regression: the minimum of  mean log-loss + l2 / 2 |w|^2  (the intercept is not penalised).

    Args:
        x: (N, H) features, dense or sparse, scaled by the caller.
        y: (N,) in {0, 1}.

    Returns:
        weight (H,) and intercept.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    sign = np.where(np.asarray(y) > 0.5, 1.0, -1.0)

    def objective(w):
        margin = sign * (x @ w[:-1] + w[-1])
        pull = -sign * expit(-margin) / len(sign)  # d loss / d logit
        loss = np.logaddexp(0, -margin).mean() + 0.5 * l2 * w[:-1] @ w[:-1]
        return loss, np.append(x.T @ pull + l2 * w[:-1], pull.sum() if intercept else 0.0)

    result = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return result.x[:-1], float(result.x[-1])


def fit_bradley_terry(chosen: np.ndarray, rejected: np.ndarray, l2: float) -> tuple[np.ndarray, float]:
    """Weight (H,) and 0 of a Bradley-Terry model, P(chosen beats rejected) = sigmoid(w . (f_chosen - f_rejected)).

    Differences are scaled to unit variance for the penalty; the weight returned is for features as they are.
    """
    difference = np.asarray(chosen, np.float64) - rejected
    scale = np.sqrt((difference**2).mean(0)) + 1e-8
    weight, _ = fit_logistic(difference / scale, np.ones(len(difference)), l2, intercept=False)
    return weight / scale, 0.0


def fit_labels(features: np.ndarray, labels: np.ndarray, l2: float) -> tuple[np.ndarray, float]:
    """Weight (H,) and intercept of a logistic regression on standardised features, for features as they are."""
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64) + 1e-8
    weight, bias = fit_logistic((features - mean) / scale, labels, l2, intercept=True)
    weight = weight / scale
    return weight, bias - float(weight @ mean)


def standardised(weight: np.ndarray, bias: float, features: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Weight, bias and empty value of the same ranking with mean 0 and standard deviation 1 over these responses.

    A Bradley-Terry model leaves the offset open, and rewards of one scale make the weights of objectives comparable.
    An empty response gets the 5 % quantile: in no reward's interest.
    """
    rewards = features.astype(np.float64) @ weight + bias
    mean, scale = float(rewards.mean()), float(rewards.std()) or 1.0
    return weight / scale, (bias - mean) / scale, float(np.quantile((rewards - mean) / scale, 0.05))


L2_GRID = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


def held_out_margins(fit, x, y: np.ndarray, groups: Sequence[str], l2: float, folds: int = 5) -> np.ndarray:
    """(N,) logits of the right answer for each row, by a model that was fitted without its fold.

    Args:
        fit: (indices, l2) -> (weight, intercept), fitted on those rows of x.
        x: (N, H) dense or sparse; y: (N,) in {0, 1}.
        groups: (N,); rows of one group fall into one fold.
    """
    fold = np.array([int(hashlib.sha256(str(g).encode()).hexdigest()[:8], 16) % folds for g in groups])
    margins = np.zeros(len(y))
    for held in np.unique(fold):
        inside, outside = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        if len(inside):
            weight, bias = fit(inside, l2)
            margins[outside] = np.where(y[outside] > 0.5, 1.0, -1.0) * (x[outside] @ weight + bias)
    return margins


def choose_l2(fit, x, y: np.ndarray, groups: Sequence[str], grid: Sequence[float] = L2_GRID) -> float:
    """The penalty with the best log-loss on held-out folds; arguments as in `held_out_margins`."""
    bar = progress(grid, desc="penalties", unit="fit")
    losses = [np.logaddexp(0, -held_out_margins(fit, x, y, groups, l2)).mean() for l2 in bar]
    return float(grid[int(np.argmin(losses))])
