"""Candidate heads: from the state before them, what a value model's own head would say at each of the k candidates.

A value model reads k candidates a step; with a candidate head it reads the one that was taken. The head is distilled:
it is fitted to what the value model says of the candidates along answers to training prompts, which needs no rewards
and no trees. It is a token table, and a bilinear form of the state and the candidate's embedding, fitted to what the
table leaves. Only differences between the candidates of a state steer, so only these are fitted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils import tilting
from utils.cached_models import without_adapter
from utils.cli import progress
from utils.completions import eos_tensor, steps_between_looks
from utils.errors import DataError
from utils.files import same_header, write_atomically
from utils.policies import MavisPolicy, last_states

TABLE_SHRINKAGE = 5.0  # a token's mean is drawn to 0 as by so many candidates more
HELD_OUT = 5  # every fifth prompt is held out
CHECKSUM = "sha256"


class CandidateHead(nn.Module):
    """q(s, a) = table[a] + (U h(s)) . (V e(a)).

    Args:
        table: (V,); state: U, (r, H); token: V, (r, E).
        embeddings: (V, E), the value model's; V e(a) is made once for all tokens.
    """

    def __init__(self, table: Tensor, state: Tensor, token: Tensor, embeddings: Tensor):
        super().__init__()
        for name, tensor in (("table", table), ("state", state), ("token", token)):
            self.register_buffer(name, tensor)
        self.register_buffer("tokens", embeddings.to(token) @ token.T)  # (V, r)

    def forward(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """(B, k) of states (B, H) and candidates (B, k)."""
        u = states.to(self.state) @ self.state.T  # (B, r)
        return self.table[token_ids] + (u.unsqueeze(1) * self.tokens[token_ids]).sum(-1)


# ------------------------------------------------------------------------------------------------------ what is fitted


@dataclass(frozen=True)
class Seen:
    """What value models say of the candidates of N states.

    states {objective: (N, H)} float32; token_ids (N, k); scores {objective: (N, k)} float32; prompt (N,).
    """

    states: dict[str, Tensor]
    token_ids: Tensor
    scores: dict[str, Tensor]
    prompt: Tensor


class _Watching(MavisPolicy):
    """MAVIS that keeps the states before the candidates, and shows what is said of these."""

    def _extras_of(self, prompts, states, begun):
        return super()._extras_of(prompts, states, begun) | last_states(states)

    def _read_values(self, tokens):
        self.behind = super()._read_values(tokens)
        return self.behind

    def _candidate_scores(self):
        self.said = super()._candidate_scores()
        return self.said

    def _choose(self, choice, tokens):
        for i, x in enumerate(self.behind):
            self.extras[f"state {i}"] = x[torch.arange(len(choice), device=choice.device), :, choice]
        super()._choose(choice, tokens)

    def states_by_objective(self) -> list[Tensor]:
        """(B, H) of each objective's value model, in the objectives' order."""
        states = (
            x
            for i, reader in enumerate(self.value_readers)
            for x in self.extras[f"state {i}"].expand(-1, len(reader.heads), -1).unbind(1)
        )
        found = dict(zip(self._order, states, strict=True))
        return [found[m] for m in range(len(found))]


@torch.inference_mode()
def watch(
    reference,
    value_models: Mapping[str, nn.Module],
    prompts: Sequence[Sequence[int]],
    *,
    betas: Sequence[float],
    top_k: int,
    temperature: float,
    normalization: str,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    batch_size: int,
    seed: int = 0,
) -> Seen:
    """Answer prompts with MAVIS, each batch at another beta and at random weights, and keep what the value models say.

    The states are so those that are met in decoding, at any weights.

    Args:
        betas: in turn, one a batch; 0 is the reference.
        (the others as in `decode` and `MavisPolicy`)
    """
    names, seen = list(value_models), []
    bar = progress(total=len(prompts), desc="answers", unit="prompt")
    for number, first in enumerate(range(0, len(prompts), batch_size)):
        batch = dict(enumerate(prompts[first : first + batch_size], start=first))
        weights = np.random.default_rng([seed, number]).dirichlet(np.ones(len(names)))
        policy = _Watching(
            reference, dict(value_models), dict(zip(names, weights, strict=True)), beta=betas[number % len(betas)],
            top_k=top_k, temperature=temperature, normalization=normalization,
        )  # fmt: skip
        seen.append(_watch_batch(policy, batch, max_new_tokens, eos_token_id, seed))
        bar.update(len(batch))
    bar.close()
    return Seen(
        {n: torch.cat([s.states[n] for s in seen]) for n in names}, torch.cat([s.token_ids for s in seen]),
        {n: torch.cat([s.scores[n] for s in seen]) for n in names}, torch.cat([s.prompt for s in seen]),
    )  # fmt: skip


def _watch_batch(
    policy: _Watching,
    prompts: Mapping[int, Sequence[int]],
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    seed: int,
) -> Seen:
    """Answer some prompts, {index: token ids}, in one batch. All that is seen stays on the device until its end."""
    policy.open(len(prompts))
    policy.load(range(len(prompts)), policy.prefill([list(p) for p in prompts.values()]))
    keys = torch.tensor([tilting.fold_key((seed, i)) for i in prompts], device=policy.device)
    eos, alive = eos_tensor(eos_token_id, policy.device), torch.ones_like(keys, dtype=torch.bool)
    unsound, steps = torch.zeros_like(alive)[:, None], []
    for t in range(max_new_tokens):
        step = policy.distribution()
        steps.append((alive, step.token_ids, policy.states_by_objective(), policy.said))
        unsound = unsound | (alive[:, None] & policy.unsound)
        choice = tilting.sample(step.p_tilt, tilting.uniforms(keys, torch.full_like(keys, t)))
        taken = step.token_ids.gather(1, choice.unsqueeze(1)).squeeze(1)
        alive = alive & ~torch.isin(taken, eos)
        if t + 1 == max_new_tokens or ((t + 1) % steps_between_looks(policy.device) == 0 and not bool(alive.any())):
            break
        policy.advance(choice)
    for index, row in zip(prompts, unsound.tolist(), strict=True):
        if any(row):
            raise DataError(f"prompt {index}: {policy.complaint(row)}; no candidate head can be fitted to that")
    alive, ids, states, said = zip(*steps, strict=True)
    rows = torch.stack(alive)  # (T, B), which answers went on at each step

    def kept(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors))[rows].cpu()  # (N, ...)

    return Seen(
        {name: kept(x).float() for name, x in zip(policy.objectives, zip(*states, strict=True), strict=True)},
        kept(ids),
        {name: kept([x[:, m] for x in said]).float() for m, name in enumerate(policy.objectives)},
        kept([torch.tensor(list(prompts), device=policy.device)] * len(steps)),
    )


# ---------------------------------------------------------------------------------------------------------------- fit


def centred(x: Tensor) -> Tensor:
    """(N, k) less the mean of each row: what tells a state's candidates apart."""
    return x - x.mean(-1, keepdim=True)


def agreement(scores: Tensor, predicted: Tensor) -> float:
    """Correlation of scores and predictions (N, k) over the candidates of a state; nan where one does not vary."""
    x, y = centred(scores.double()), centred(predicted.double())
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def fit_table(token_ids: Tensor, scores: Tensor, vocab_size: int) -> Tensor:
    """(V,) means of each token's centred scores, drawn to 0 where it was seen seldom."""
    flat, values = token_ids.reshape(-1), centred(scores).reshape(-1).double()
    total = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, flat, values)
    count = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, flat, torch.ones_like(values))
    return (total / (count + TABLE_SHRINKAGE)).float()


def fit_candidate_head(
    states: Tensor,
    token_ids: Tensor,
    scores: Tensor,
    prompt: Tensor,
    embeddings: Tensor,
    *,
    rank: int = 64,
    epochs: int = 12,
    lr: float = 2e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict]:
    """Fit a head to scores of candidates.

    Args:
        states (N, H), token_ids and scores (N, k), prompt (N,): as in `Seen`; embeddings (V, E).
        rank: of the bilinear form.

    Returns:
        the head's tensors, and its agreement with the value model on held-out prompts: of the whole head, of its table
        alone, and of the whole head with every state at the mean (what of it needs no context).

    Raises:
        DataError: too few prompts to hold some out.
    """
    held = prompt % HELD_OUT == HELD_OUT - 1
    if not held.any() or held.all():
        raise DataError(f"a candidate head needs at least {HELD_OUT} prompts, some of them are held out")
    x, ids, y = states[~held], token_ids[~held], centred(scores[~held])
    unit, size, spread = y.std(), x.square().mean().sqrt(), embeddings.square().mean().sqrt()
    table = fit_table(ids, y, len(embeddings))
    x, rest, tokens = x / size, centred(y - table[ids]) / unit, embeddings / spread
    generator = torch.Generator().manual_seed(seed)
    # Products of order 1 at the start; one side at 0 lets the form begin at nothing.
    u = nn.Parameter(torch.randn(rank, x.shape[1], generator=generator) / x.shape[1] ** 0.5)
    v = nn.Parameter(torch.zeros(rank, tokens.shape[1]))
    optimizer = torch.optim.AdamW([u, v], lr=lr, weight_decay=1e-2)
    size_of_batch = min(batch_size, len(x))
    steps = epochs * (len(x) // size_of_batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    bar = progress(total=steps, desc="candidate head", unit="step")
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // size_of_batch * size_of_batch].view(-1, size_of_batch):
            q = ((x[rows] @ u.T).unsqueeze(1) * (tokens[ids[rows]] @ v.T)).sum(-1)  # (n, k)
            loss = (centred(q) - rest[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    bar.close()
    tensors = {"table": table, "state": u.detach() * (unit / size), "token": v.detach() / spread}
    with torch.no_grad():
        head = CandidateHead(**tensors, embeddings=embeddings)
        x, ids, y = states[held], token_ids[held], scores[held]
        frozen = states[~held].mean(0, keepdim=True).expand_as(x)
        report = {
            "correlation": agreement(y, head(x, ids)),
            "correlation_table": agreement(y, table[ids]),
            "correlation_frozen_state": agreement(y, head(frozen, ids)),
            "states": int((~held).sum()),
            "held_out_states": int(held.sum()),
            "rank": rank,
        }
    return tensors, report


# -------------------------------------------------------------------------------------------------------------- files


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_candidate_head(path: str | Path, tensors: Mapping[str, Tensor], report: Mapping, value_model: str) -> None:
    """A head as safetensors, with its report and the fingerprint of its value model in the header."""
    from safetensors.torch import save

    kept = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    metadata = {"report": json.dumps(report), "value_model": value_model, CHECKSUM: _checksum(kept)}
    write_atomically(Path(path), same_header(save(kept, metadata=metadata)))


def load_candidate_head(path: str | Path, model: nn.Module, value_model: str, made_by: str) -> CandidateHead:
    """The head of a value model, on its device.

    Args:
        model: the value model; value_model: its fingerprint, which the file must name.
        made_by: the command that makes the head, for messages.

    Raises:
        DataError: no such head, a damaged one, or one of another value model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    again = f"make it with: {made_by}"
    if not path.is_file():
        raise DataError(f"no candidate head {path}; {again}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("table", "state", "token")}
        if metadata.get(CHECKSUM) != _checksum(tensors):
            raise ValueError("its checksum is not the one that was written")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no candidate head ({type(error).__name__}: {error}); {again}") from error
    if metadata.get("value_model") != value_model:
        raise DataError(f"{path} was fitted to another value model than the one that is there; {again}")
    embeddings = without_adapter(model).get_input_embeddings().weight
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    rank, hidden = shapes["state"] if tensors["state"].ndim == 2 else (0, 0)
    expected = {"table": (len(embeddings),), "state": (rank, hidden), "token": (rank, embeddings.shape[1])}
    if (
        shapes != expected
        or hidden != model.config.hidden_size
        or not all(t.isfinite().all() for t in tensors.values())
    ):
        raise DataError(f"{path} does not fit the value model: shapes {shapes}; {again}")
    dtype = tilting.wide_dtype(embeddings.dtype)
    tensors = {name: tensor.to(embeddings.device, dtype) for name, tensor in tensors.items()}
    return CandidateHead(**tensors, embeddings=embeddings.detach().to(dtype))
