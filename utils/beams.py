"""Beam search over values: continuations are sampled from the tilted distribution and ranked by their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from utils import tilting
from utils.completions import Completion, check_prompts, eos_tensor, not_finite, prompt_of, steps_between_looks
from utils.graphs import Place
from utils.policy_base import Policy, Step


def beam_key(key: tuple[int, ...], beam: int, draw: int) -> tuple[int, ...]:
    """The randomness of a beam's draw; the first of the first is the plain decoder's."""
    return tuple(key) if beam == draw == 0 else (*key, beam, draw)


class _Beams:
    """The beams of P prompts, and the best texts that have ended, on the policy's device.

    (P, Q) tensors of each beam, tokens (P, Q, T); (P, N) tensors of the ended texts, their tokens (P, N, T), best
    first, -inf where there is none yet. A prompt starts as its first beam alone.
    """

    def __init__(
        self,
        keys,
        num_beams: int,
        num_samples: int,
        num_return: int,
        max_new_tokens: int,
        eos: Tensor,
        objectives: int,
    ):
        device, p = eos.device, len(keys)
        self.num_beams, self.num_samples = num_beams, num_samples
        self.num_return, self.max_new_tokens = num_return, max_new_tokens
        folded = [
            [[tilting.fold_key(beam_key(key, b, d)) for d in range(num_samples)] for b in range(num_beams)]
            for key in keys
        ]
        alive = torch.zeros(p, num_beams, dtype=torch.bool, device=device)
        alive[:, 0] = True
        self._shared = {"step": torch.zeros(1, dtype=torch.int64, device=device), "eos": eos}
        self._beams = {"alive": alive, **self._texts(p, num_beams, device)}
        self._ended = self._texts(p, num_return, device)
        self._ended["length"] = torch.zeros(p, num_return, dtype=torch.int64, device=device)
        self._prompts = {
            "key": torch.tensor(folded, dtype=torch.int64, device=device),
            "unsound": torch.zeros(p, 1 + objectives, dtype=torch.bool, device=device),
            "decoded": torch.zeros(p, dtype=torch.int64, device=device),  # tokens of all beams, while one goes on
        }

    def _texts(self, prompts: int, texts: int, device: torch.device) -> dict[str, Tensor]:
        def full(value):
            return torch.full((prompts, texts), value, dtype=torch.float64, device=device)

        tokens = torch.zeros(prompts, texts, self.max_new_tokens, dtype=torch.int64, device=device)
        return {"tokens": tokens, "value": full(-math.inf), "log_prob": full(0.0), "reference_log_prob": full(0.0)}

    @property
    def alive(self) -> Tensor:
        return self._beams["alive"]

    @property
    def unsound(self) -> Tensor:
        """(P, 1 + M), see `Policy.distribution`."""
        return self._prompts["unsound"]

    def places(self) -> dict[str, Place]:
        """Where the tensors are kept that a step reads and changes."""
        parts = {"shared": self._shared, "beam": self._beams, "ended": self._ended, "prompt": self._prompts}
        return {f"{what}'s {name}": (part, name) for what, part in parts.items() for name in part}

    def choose(self, step: Step, combined: Tensor, unsound: Tensor) -> tuple[Tensor, Tensor]:
        """Every beam draws its tokens; the best that go on are the next beams, and the best that ended are kept.

        Returns:
            of each next beam, the row (P * Q,) that it continues and the candidate (P * Q,) that it takes there.
        """
        key, beams, now = self._prompts["key"], self._beams, self._shared["step"]
        p, q, s = key.shape
        choice = tilting.sample(step.p_tilt.repeat_interleave(s, 0), tilting.uniforms(key.flatten(), now)).view(-1, s)
        token, value, log_p, log_q = (
            x.gather(1, choice).view(p, q * s)
            for x in (step.token_ids, combined.double(), step.p_tilt.double().log(), step.p_ref.double().log())
        )
        drawn = {name: x.repeat_interleave(s, 1) for name, x in beams.items()}
        drawn["tokens"].scatter_(2, now.expand(p, q * s, 1), token.unsqueeze(2))
        drawn |= {
            "value": value,
            "log_prob": drawn["log_prob"] + log_p,
            "reference_log_prob": drawn["reference_log_prob"] + log_q,
        }
        self._prompts["decoded"] = self._prompts["decoded"] + q * beams["alive"].any(1)
        alive = drawn.pop("alive")
        ended = alive & (token.unsqueeze(2) == self._shared["eos"]).any(2)
        self._prompts["unsound"] = self.unsound | (unsound.view(p, q, -1) & beams["alive"].unsqueeze(2)).any(1)

        new = drawn | {"value": value.where(ended, -math.inf), "length": torch.where(ended, now + 1, 0)}
        both = {name: torch.cat([x, new[name]], dim=1) for name, x in self._ended.items()}
        best = both["value"].sort(dim=1, descending=True, stable=True).indices[:, : self.num_return]
        self._ended.update({name: _pick(x, best) for name, x in both.items()})

        going = alive & ~ended
        ranked = value.where(going, -math.inf).sort(dim=1, descending=True, stable=True).indices
        left = going.sum(1, keepdim=True)
        # Where fewer are left than there are beams, they are repeated from the best on.
        chosen = ranked.gather(1, torch.arange(q, device=left.device) % left.clamp(min=1))
        beams.update({name: _pick(x, chosen) for name, x in drawn.items()}, alive=(left > 0).expand(p, q))
        self._shared["step"] = now + 1
        rows = chosen // s + q * torch.arange(p, device=left.device).unsqueeze(1)
        return rows.flatten(), choice.view(p, q * s).gather(1, chosen).flatten()

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these prompts alone."""
        index = torch.as_tensor(places, device=self.alive.device)
        for part in (self._beams, self._ended, self._prompts):
            part.update({name: x[index] for name, x in part.items()})

    def best(self, places: Sequence[int]) -> list[list[Completion]]:
        """The best texts of these prompts by value, best first; of equals, those that have ended come first."""
        index = torch.as_tensor(places, dtype=torch.int64, device=self.alive.device)
        ended, going = ({name: x[index].tolist() for name, x in part.items()} for part in (self._ended, self._beams))
        steps, decoded = int(self._shared["step"]), self._prompts["decoded"][index].tolist()

        def text(of: dict, i: int, n: int, length: int, finished: bool) -> Completion:
            log_prob, reference_log_prob = of["log_prob"][i][n], of["reference_log_prob"][i][n]
            tokens, log_ratio = of["tokens"][i][n][:length], log_prob - reference_log_prob
            return Completion(tokens, log_ratio, finished, log_prob, reference_log_prob, value=of["value"][i][n])

        found = []
        for i in range(len(places)):
            lengths = ended["length"][i]  # 0: none has ended
            texts = [text(ended, i, n, length, True) for n, length in enumerate(lengths) if length]
            texts += [text(going, i, b, steps, False) for b, alive in enumerate(going["alive"][i]) if alive]
            best = sorted(texts, key=lambda c: -c.value)[: self.num_return]  # stable: of equals, the earlier
            found.append([replace(c, decoded=decoded[i] / len(best)) for c in best])
        return found


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Of texts (P, C, ...), those of an index (P, D)."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(*index.shape, *x.shape[2:]))


@torch.inference_mode()
def beam_search(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    num_beams: int,
    num_return: int,
    num_samples: int = 1,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    batch_size: int = 64,
    suppress_first_eos: bool = False,
    on_completion=None,
) -> list[list[Completion]]:
    """Search over values: beams are continued by sampling from the tilted distribution and ranked by value.

    Each of `num_beams` beams draws `num_samples` tokens. All continuations of a prompt are ranked by their unnormalised
    combined value; those that ended join the finished ones, the best `num_beams` of the rest go on, and where fewer
    are left they are repeated from the best on. A prompt starts as one beam, so that the first step gives copies of
    what it drew, which diverge by sampling. At the end the unfinished beams join the finished ones.

    Args:
        policy: one whose candidates have values (MavisPolicy, TokenTablePolicy).
        num_return: completions per prompt, the best by value first; fewer where there are fewer.
        batch_size: rows at a time; at least one prompt's beams.
        (the others as in `decode`)
    """
    for name, number in (("num_beams", num_beams), ("num_return", num_return), ("num_samples", num_samples)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not hasattr(policy, "beta"):
        raise ValueError(f"beam search ranks by values, and a {type(policy).__name__} has none")
    if len(prompts) != len(keys):
        raise ValueError(f"{len(prompts)} prompts but {len(keys)} keys")
    check_prompts(prompts, max_new_tokens, policy.context)
    eos = eos_tensor(eos_token_id, policy.device)
    at_once = max(1, batch_size // num_beams)
    results: list[list[Completion]] = []
    for first in range(0, len(prompts), at_once):
        group, of_group = prompts[first : first + at_once], keys[first : first + at_once]
        beams = _Beams(of_group, num_beams, num_samples, num_return, max_new_tokens, eos, len(policy.objectives))
        found = _search(policy, group, of_group, beams, eos if suppress_first_eos else None)
        results += found
        if on_completion is not None:
            for completions in found:
                on_completion(sum(len(c.token_ids) for c in completions))
    return results


def _search(policy: Policy, prompts, keys, beams: _Beams, forbidden: Tensor | None) -> list[list[Completion]]:
    """The search of a group of prompts that share a batch: the best texts of each."""
    snapshots = policy.prefill([list(p) for p in prompts], forbidden=forbidden)
    policy.open(len(prompts) * beams.num_beams)
    policy.load(range(policy.rows), [s for s in snapshots for _ in range(beams.num_beams)])
    found: list[list[Completion]] = [[] for _ in prompts]
    searched = list(range(len(prompts)))  # the prompts of the beams
    look_every = steps_between_looks(policy.device)
    for t in range(beams.max_new_tokens):
        last, moves, like = t + 1 == beams.max_new_tokens, None, range(policy.rows)
        if policy.graphs is not None:
            _recorded_step(policy, beams)
        else:
            moves = beams.choose(policy.distribution(), policy.combined, policy.unsound)
        if last or (t + 1) % look_every == 0:
            goes_on, unsound = torch.stack([beams.alive.any(1), beams.unsound.any(1)]).tolist()
            if any(unsound):
                place = unsound.index(True)
                which = prompt_of(keys[searched[place]], searched[place])
                raise not_finite(which, policy.complaint(beams.unsound[place].tolist()), t + 1)
            ended = [place for place, goes in enumerate(goes_on) if last or not goes]
            if ended:
                for place, texts in zip(ended, beams.best(ended), strict=True):
                    found[searched[place]] = texts
                if len(ended) == len(searched):
                    break
                kept = [place for place in range(len(searched)) if place not in ended]
                searched = [searched[place] for place in kept]
                beams.keep(kept)
                like = [place * beams.num_beams + b for place in kept for b in range(beams.num_beams)]
                if moves is None:
                    policy.take(like, len(like))
                else:
                    moves = [x.view(-1, beams.num_beams)[kept].flatten() for x in moves]
        if moves is not None:
            rows, choice = moves
            policy.fork(rows, like)
            policy.advance(choice)
    return found


def _recorded_step(policy: Policy, beams: _Beams) -> None:
    """A whole step of a search, the models' reading of the chosen tokens included, as a graph of the policy's."""

    def choose() -> Tensor:
        rows, choice = beams.choose(policy.distribution(), policy.combined, policy.unsound)
        policy.fork(rows, range(policy.rows))
        return choice

    policy.recorded_step(choose, beams.places())
