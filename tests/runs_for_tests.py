"""Run folders with made-up rewards whose truth is known."""

import numpy as np

from utils.runs import RunSpec, open_run

OBJECTIVES = ("help", "harm", "humor")
LABEL = "made-up world"


def make_run(
    workspace,
    method="mavis",
    weights=None,
    *,
    beta=None,
    num_samples=1,
    more_series=None,
    gain=1.0,
    kl=1.0,
    prompts=range(20),
    trials=2,
    seed=0,
    track=True,
    finish=True,
    judge=False,
    label=LABEL,
    rerun=False,
    topk=15,
    split="test",
    determining=None,
    ask="question {}",
    answer="```{}``` | answer\n{} to {}",
):
    """One run folder; each objective's mean is `gain` times the root of its weight, prompts share their own level.

    `more_series` are further settings of its series; `ask` makes the prompt of an index, `answer` the response of a
    method, a trial and an index.
    """
    weights = weights or {}
    level = np.random.default_rng(123).normal(size=(max(prompts) + 1, len(OBJECTIVES)))
    parts = [seed, *method.encode(), int(10 * (beta or 0))]
    rng = np.random.default_rng(parts + [int(100 * weights.get(o, 0)) for o in OBJECTIVES])
    series = ({} if beta is None else {"beta": beta}) | ({"num_samples": num_samples} if num_samples > 1 else {})
    series |= more_series or {}
    shift = {o: gain * (weights[o] ** 0.5 if o in weights else -0.4 if weights else 0.0) for o in OBJECTIVES}
    spec = RunSpec(
        kind="mavis_logs" if method.startswith("mavis") else "baseline_logs",
        dataset="anthropic",
        method=method,
        objectives=tuple(weights) or OBJECTIVES,
        weights=weights,
        series=series,
        indices=tuple(prompts),
        num_trials=trials,
        arguments={
            "data_split": split,
            "seed": seed,
            "topk": topk,
            "temperature": 1.0,
            "num_samples": num_samples,
            "track_KL": track,
        },  # fmt: skip
        determining=determining or {},
        configuration={"label": label, "datasets": {"anthropic": {"objectives": list(OBJECTIVES)}}},
        kl_added=float(np.log(num_samples) - (num_samples - 1) / num_samples),
    )
    rows = []
    for index in prompts:
        for trial in range(trials):
            noise = rng.normal(size=len(OBJECTIVES)) * 0.5
            rewards = {o: float(level[index, m] + noise[m] + shift[o]) for m, o in enumerate(OBJECTIVES)}
            row = {
                "index": index, "trial": trial, "prompt": f"\n\nHuman: {ask.format(index)}\n\nAssistant: ",
                "response": answer.format(method, trial, index), "rewards": rewards,
            }  # fmt: skip
            if judge:
                row["extra"] = {"judge_help": rewards["help"] + float(noise[0])}
            if track:
                row["log_ratio"] = float(kl + 0.3 * rng.normal())
                if num_samples == 1 and method != "mod":  # as of a policy that is a tilted reference
                    row |= {"kl_exact": kl + 0.01 * (index % 7), "kl_top_k": kl - 0.4 + 0.01 * (index % 7)}
            tokens = 10 + index % 3
            row |= {"reference_log_prob": -20.0, "tokens": tokens, "generated_tokens": tokens * num_samples,
                    "language_tokens": float(tokens * num_samples), "value_tokens": 15.0 * tokens * (method == "mavis"),
                    "gflop": tokens * num_samples * (1.5 if method == "mavis" else 0.5),
                    "distinct": 0.8, "finished": trial == 0, "num_candidates": num_samples,
                    "seconds": 0.25 * num_samples + 0.01 * (index % 5)}  # fmt: skip
            rows.append(row)
    with open_run(workspace, spec, rerun=rerun) as run:
        run.append(rows if finish else rows[:-1])
        if finish:
            run.finish()
    return run.folder


def make_world(workspace, prompts=range(20), pair=("help", "harm"), betas=(2.0, 4.0), judge=False):
    """The reference, MAVIS and a token table over weights and betas, best of 16."""
    shared = {"prompts": prompts, "judge": judge}
    make_run(workspace, "reference", kl=0.6, **shared)
    for w in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        weights = {o: x for o, x in zip(pair, (w, 1 - w), strict=True) if x > 0}
        for beta in betas:
            make_run(workspace, "mavis", weights, beta=beta, gain=0.4 * beta**0.8, kl=1.1 * beta, **shared)
            make_run(workspace, "token_table", weights, beta=beta, gain=0.33 * beta**0.8, kl=1.2 * beta, **shared)
        make_run(workspace, "best_of_n", weights, num_samples=16, gain=0.9, kl=0.6, **shared)
