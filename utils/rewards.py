"""Rewards of responses: `RewardSet(...).score(prompts, responses) -> {objective: (N,) float64}`.

Three kinds (`ObjectiveSpec.kind`): sequence-classification checkpoints, linear heads on a shared frozen trunk
(`pooled_reward.py`), and Python callables. Models are loaded once and stay on their device; texts are batched by
length.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from utils import models
from utils.batching import length_batches, pad_right
from utils.cached_models import context_length
from utils.errors import DataError
from utils.places import training_command
from utils.pooled_reward import PooledHead, encode_texts, load_head, pooled_features, trunk_fingerprint
from utils.prefix_tree import ROW_TOKENS, classifies_rows, read_rows
from utils.specs import Config, DatasetSpec, ObjectiveSpec
from utils.text_formats import fill, format_of, reward_text, shown_to_reference

TOKEN_BUDGET = 8192  # tokens of a batch, padding included


class RewardSet:
    """The rewards of some objectives, loaded once.

    Args:
        objectives: names; no other objective is loaded.
        batch_size: most rows of texts in a forward pass (which also keeps to `token_budget` tokens).
        row_tokens: most tokens of a row in which texts that begin alike are read (`prefix_tree.read_rows`), by decoders
            that can (`prefix_tree.classifies_rows`) and pooled heads; 0: each text has a row of its own.
        autocast: run the models in bfloat16. By default only on a CPU whose configuration says `cpu_dtype: bfloat16`;
            elsewhere rewards, which are what is reported, are float32 whatever the policy's precision.
    """

    def __init__(
        self,
        config: Config,
        dataset_spec: DatasetSpec,
        objectives: Sequence[str],
        device: torch.device | str | None = None,
        batch_size: int = 32,
        *,
        token_budget: int = TOKEN_BUDGET,
        row_tokens: int = ROW_TOKENS,
        autocast: bool | None = None,
    ):
        self.dataset, self.objectives = dataset_spec, tuple(objectives)
        device = models.pick_device(str(device) if device is not None else None)
        if autocast is None:
            autocast = device.type == "cpu" and config.cpu_dtype == "bfloat16"
        options = dict(batch_size=batch_size, token_budget=token_budget, row_tokens=row_tokens, autocast=autocast)
        pools: dict[tuple, _Pool] = {}
        self._scorers = []
        for spec in map(config.objective, self.objectives):
            if spec.kind == "callable":
                self._scorers.append(_Callable(config, spec, device))
            elif spec.kind == "classifier":
                self._scorers.append(_Classifier(config, spec, device, **options))
            else:
                head = load_head(config.locate(spec.path), spec.name, training_command(config, spec))
                key = (config.locate(head.trunk), head.num_layers, head.max_length, text_before_response(spec))
                if key not in pools:
                    pools[key] = _Pool(config, *key, device, **options)
                    self._scorers.append(pools[key])
                pools[key].add(spec, head)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, np.ndarray]:
        """Rewards of each response to its prompt, {objective: (N,) float64}, in the order given.

        Args:
            prompts: (N,) prompts of the data set (the CSV's); responses: (N,) answers without the end token.

        Raises:
            DataError: a reward that is not a finite number; the message names the objective and the prompt.
        """
        prompts, responses = list(prompts), list(responses)
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts but {len(responses)} responses")
        user_of = {p: format_of(self.dataset).user_of_prompt(p) for p in set(prompts)}
        shown_of = {p: shown_to_reference(self.dataset, p) for p in set(prompts)}
        return self.score_texts(prompts, [user_of[p] for p in prompts], [shown_of[p] for p in prompts], responses)

    def score_texts(
        self, prompts: Sequence[str], users: Sequence[str], shown: Sequence[str], responses: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """`score` for conversations that are not one prompt of the data set: every field of the templates is given."""
        scores: dict[str, np.ndarray] = {}
        if responses:
            for scorer in self._scorers:
                scores.update(scorer.score(prompts, users, shown, responses))
        for name in self.objectives:
            values = scores.setdefault(name, np.zeros(0))
            if not np.isfinite(values).all():
                bad = int(np.flatnonzero(~np.isfinite(values))[0])
                raise DataError(
                    f"the reward {name} of response {bad} is {values[bad]} (prompt {prompts[bad][:200]!r}, "
                    f"response {responses[bad][:200]!r}); rewards must be finite numbers"
                )
        return {name: scores[name] for name in self.objectives}


def text_before_response(spec: ObjectiveSpec) -> str:
    """The part of a pooled objective's text before the response; what follows cannot change its states."""
    before, marker, _ = spec.text.partition("{response}")
    if not marker:
        raise DataError(f"objectives.{spec.name}.text must contain {{response}}, got {spec.text!r}")
    return before


class _Pool:
    """Pooled objectives that share a trunk and the text before the response: one forward pass for all."""

    def __init__(
        self, config: Config, path: str, num_layers: int | None, max_length: int, before: str, device, **options
    ):
        self.before, self.max_length, self.options = before, max_length, options
        made_by = config.base_model.made_by
        self.tokenizer = models.load_tokenizer(path, made_by=made_by)
        self.trunk = models.load_trunk(path, num_layers, device, made_by=made_by)
        self.fingerprint = trunk_fingerprint(self.trunk)
        self.path, self.config = path, config
        self.heads: dict[str, PooledHead] = {}

    def add(self, spec: ObjectiveSpec, head: PooledHead) -> None:
        if head.fingerprint not in ("", self.fingerprint) or len(head.weight) != self.trunk.config.hidden_size:
            raise DataError(
                f"the reward model of {spec.name} was trained on another trunk than {self.path}; make it again with: "
                + training_command(self.config, spec)
            )
        self.heads[spec.name] = head

    def score(self, prompts, users, shown, responses) -> dict[str, np.ndarray]:
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        before = [
            fill(self.before, prompt=p, user=u, shown=s, bos=bos, eos=eos)
            for p, u, s in zip(prompts, users, shown, strict=True)
        ]
        encoded = encode_texts(self.tokenizer, before, responses, self.max_length)
        features = pooled_features(self.trunk, encoded, self.tokenizer.pad_token_id, **self.options)
        empty = np.array([len(ids) == start for ids, start in encoded])
        return {name: head.score(features, empty) for name, head in self.heads.items()}


class _Classifier:
    """A sequence-classification checkpoint: sign times one logit."""

    def __init__(self, config: Config, spec: ObjectiveSpec, device, *, row_tokens: int, autocast: bool, **sizes: int):
        self.spec, self.autocast, self.sizes = spec, autocast, sizes
        path, made_by = config.locate(spec.path), training_command(config, spec)
        if not Path(path).exists() and (made_by or path.count("/") != 1):  # no Hub name: do not ask there
            hint = f"; make it with: {made_by}" if made_by else ""
            raise DataError(f"reward model of {spec.name}: no folder {config.default_path(path)}{hint}")
        what = f"reward model of {spec.name}"
        self.model, self.tokenizer = models.load_sequence_classifier(path, device, what=what, made_by=made_by)
        labels = self.model.config.num_labels
        if not 0 <= spec.label < labels:
            raise DataError(
                f"objectives.{spec.name}.label is {spec.label}, but {spec.path} has {labels} labels (0 to {labels - 1})"
            )
        limits = (spec.max_length, self.tokenizer.model_max_length, context_length(self.model))
        self.max_length = int(min(n for n in limits if n))
        self.row_tokens = row_tokens if classifies_rows(self.model, self.max_length) else 0

    def score(self, prompts, users, shown, responses) -> dict[str, np.ndarray]:
        tok = self.tokenizer
        texts = [
            reward_text(self.spec.text, prompt=p, user=u, shown=s, response=r, bos=tok.bos_token, eos=tok.eos_token)
            for p, u, s, r in zip(prompts, users, shown, responses, strict=True)
        ]
        rows = tok(texts, truncation=True, max_length=self.max_length)["input_ids"]
        fallback = next((i for i in (tok.bos_token_id, tok.eos_token_id) if i is not None), 0)
        rows = [row or [fallback] for row in rows]
        return {self.spec.name: self.spec.sign * self.logits(rows)[:, self.spec.label]}

    def logits(self, rows: list[list[int]]) -> np.ndarray:
        """Logits (N, labels) float64 of token ids, as if each text were alone."""
        out = np.zeros((len(rows), self.model.config.num_labels))
        device = next(self.model.parameters()).device
        read = self._read_shared if self.row_tokens else self._read_alone
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            for index, logits in read(rows, device):
                out[index] = logits.double().cpu().numpy()
        return out

    def _read_shared(self, rows: list[list[int]], device) -> Iterator[tuple[list[int], torch.Tensor]]:
        """What texts have in common from their beginning on is read once."""
        if self.tokenizer.pad_token_id != self.tokenizer.eos_token_id:
            rows = [_up_to_padding(row, self.model.config.pad_token_id) for row in rows]
        read = read_rows(self.model.base_model, rows, 0, row_tokens=self.row_tokens, **self.sizes)
        for packed, hidden in read:  # no text sees the padding (0)
            row = np.repeat(np.arange(len(packed)), [len(p.members) for p in packed])
            last = np.array([path[-1] for p in packed for path in p.paths])
            states = hidden[torch.as_tensor(row, device=device), torch.as_tensor(last, device=device)]  # (m, H)
            yield [i for p in packed for i in p.members], self.model.score(states)

    def _read_alone(self, rows: list[list[int]], device) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Every text in a row of its own, as any architecture takes it."""
        for group in self._groups(rows):
            for batch in length_batches([len(rows[i]) for i in group], **self.sizes):
                chosen = [rows[i] for i in group[batch]]
                ids, mask = pad_right(chosen, self._pad_id(chosen))
                yield group[batch], self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits

    def _groups(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Texts that can share a batch: encoder-decoders read their logits at the last end token and refuse a batch
        whose texts have different numbers of them."""
        if not self.model.config.is_encoder_decoder:
            return [np.arange(len(rows))]
        ends = np.array([row.count(self.model.config.eos_token_id) for row in rows])
        return [np.flatnonzero(ends == n) for n in np.unique(ends)]

    def _pad_id(self, rows: list[list[int]]) -> int:
        """What to pad with. A decoder reads its logits at the last token that is not the padding token. Where that is
        the end token too (GPT-2), a text's own last end token would be skipped: pad with a token that no text has."""
        pad = self.tokenizer.pad_token_id
        if pad != self.tokenizer.eos_token_id:
            return pad
        used = set().union(*rows)
        self.model.config.pad_token_id = next(i for i in range(len(used) + 1) if i not in used)
        return self.model.config.pad_token_id


def _up_to_padding(row: list[int], pad_id: int) -> list[int]:
    """A text up to where a decoder reads its logits: the last token that is not padding, else the first."""
    stop = next((n for n in range(len(row), 0, -1) if row[n - 1] != pad_id), 1)
    return row[:stop]


class _Callable:
    """A Python function from (users' texts, responses) to N numbers; `device` is passed if it takes one."""

    def __init__(self, config: Config, spec: ObjectiveSpec, device):
        self.spec = spec
        module_name, _, name = spec.function.partition(":")
        where = f"objectives.{spec.name}.function {spec.function!r}"
        if not module_name or not name:
            raise DataError(f"{where} must read package.module:function")
        for folder in (
            str(Path.cwd()),
            str(config.path.resolve().parent),
        ):  # a user's module beside the command or the YAML
            if folder not in sys.path:
                sys.path.append(folder)
        try:
            self.function = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise DataError(f"{where} cannot be imported: {error}") from error
        if not callable(self.function):
            raise DataError(f"{where} is not callable, it is a {type(self.function).__name__}")
        try:
            self.options = {"device": device} if "device" in inspect.signature(self.function).parameters else {}
        except ValueError:  # a function written in C
            self.options = {}

    def score(self, prompts, users, shown, responses) -> dict[str, np.ndarray]:
        try:
            values = self.function(list(users), list(responses), **self.options)
            values = values.detach().cpu() if isinstance(values, torch.Tensor) else values
            values = np.asarray(values, np.float64)
        except DataError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"the reward {self.spec.name} ({self.spec.function}) failed: {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno}; MAVIS_DEBUG=1 shows the whole trace)"
            ) from error
        if values.shape != (len(responses),):
            raise DataError(
                f"the reward {self.spec.name} ({self.spec.function}) returned an array of shape {values.shape} "
                f"for {len(responses)} responses; it must return one number each"
            )
        return {self.spec.name: self.spec.sign * values}
