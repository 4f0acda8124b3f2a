"""Decoding as the method defines it, one sequence and one candidate at a time, without caches, batches or masks.

Shares no code with the project: it is the oracle that the fast path is compared with.
"""

import hashlib
import math

import torch


def uniform(key, step):
    """The uniform of (key, step), in Python's whole numbers."""
    mask = (1 << 64) - 1
    text = ",".join(str(part) for part in key)
    x = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    x = (x + (step + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return (x >> 11) / float(1 << 53)


@torch.no_grad()
def next_token_probs(model, tokens, temperature):
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(logits / temperature, dim=-1)


@torch.no_grad()
def value_of(model, tokens, start):
    """The head at the last token; of a model that pools, its mean over the tokens from `start` on."""
    out = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    if getattr(model.config, "value_pooling", "last") == "last":
        return float(out.logits[0, 0])
    return sum(float(model.score(state)) for state in out.hidden_states[-1][0, start:]) / (len(tokens) - start)


def step(
    reference,
    value_models,
    weights,
    tokens,
    start=0,
    *,
    beta,
    k,
    temperature,
    normalization="minmax",
    clip=6.0,
    forbidden=(),
):
    """(candidate ids, p_ref, u, p_tilt), likeliest candidate first, from facts of the method alone.

    The response begins at token number `start`.
    """
    probs = next_token_probs(reference, tokens, temperature)
    possible = [i for i in range(len(probs)) if i not in forbidden]
    ids = sorted(possible, key=lambda i: -float(probs[i]))[:k]
    p = [float(probs[i]) for i in ids]
    if not value_models:
        total = sum(p)
        return ids, p, None, [x / total for x in p]
    v = [sum(w * value_of(m, tokens + [i], start) for m, w in zip(value_models, weights, strict=False)) for i in ids]
    if normalization == "minmax":
        u = [(x - min(v)) / (max(v) - min(v) + 1e-6) for x in v]
    elif normalization == "zscore":
        mean = sum(v) / len(v)
        std = math.sqrt(sum((x - mean) ** 2 for x in v) / len(v))
        u = [(x - mean) / (std + 1e-6) for x in v]
    else:
        u = [min(x, clip / beta) if beta and clip else x for x in v]
    odds = [a * math.exp(beta * b) for a, b in zip(p, u, strict=False)]
    return ids, p, u, [o / sum(odds) for o in odds]


def decode(
    reference,
    value_models,
    weights,
    prompt,
    key,
    *,
    max_new_tokens,
    eos,
    start=None,
    suppress_first_eos=False,
    **settings,
):
    """(tokens, log-ratio, steps) of one sequence; `start` is where the response began, if not behind `prompt`."""
    start = len(prompt) if start is None else start
    tokens, log_ratio, steps = [], 0.0, []
    for t in range(max_new_tokens):
        forbidden = (eos,) if suppress_first_eos and not tokens else ()
        text = list(prompt) + tokens
        ids, p, u, tilted = step(reference, value_models, weights, text, start, forbidden=forbidden, **settings)
        threshold, running, chosen = uniform(key, t) * sum(tilted), 0.0, len(ids) - 1
        for i, q in enumerate(tilted):
            running += q
            if running > threshold:
                chosen = i
                break
        log_ratio += math.log(tilted[chosen] / p[chosen])
        tokens.append(ids[chosen])
        steps.append((ids, p, u, tilted, chosen))
        if ids[chosen] == eos:
            break
    return tokens, log_ratio, steps


def beam_search(
    reference,
    value_models,
    weights,
    prompt,
    key,
    *,
    num_beams,
    num_samples,
    max_new_tokens,
    eos,
    suppress_first_eos=False,
    **settings,
):
    """All completions (tokens, value, finished) of one prompt, best first, from the published description alone."""
    finished, beams = [], [[]]
    for t in range(max_new_tokens):
        continuations = []
        for b, tokens in enumerate(beams):
            text = list(prompt) + tokens
            forbidden = (eos,) if suppress_first_eos and t == 0 else ()
            ids, _, _, tilted = step(
                reference, value_models, weights, text, len(prompt), forbidden=forbidden, **settings
            )
            for d in range(num_samples):
                draw = key if (b, d) == (0, 0) else (*key, b, d)
                threshold, running, chosen = uniform(draw, t) * sum(tilted), 0.0, len(ids) - 1
                for i, q in enumerate(tilted):
                    running += q
                    if running > threshold:
                        chosen = i
                        break
                longer = text + [ids[chosen]]
                value = sum(w * value_of(m, longer, len(prompt)) for m, w in zip(value_models, weights, strict=False))
                continuations.append((tokens + [ids[chosen]], value))
        continuations.sort(key=lambda c: -c[1])
        finished += [(c, v, True) for c, v in continuations if c[-1] == eos]
        rest = [(c, v) for c, v in continuations if c[-1] != eos]
        beams, values = [], []
        while rest and len(beams) < num_beams:
            beams.append(rest[len(beams) % len(rest)][0])
            values.append(rest[len(values) % len(rest)][1])
        if not beams:
            break
    finished += [(c, v, False) for c, v in zip(beams, values, strict=False)]
    return sorted(finished, key=lambda f: -f[1])
