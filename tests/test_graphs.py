"""Recorded steps: on a CPU, a recorder that does what a CUDA graph does and refuses what a CUDA graph refuses."""

import itertools
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.models_for_tests import CONFIGS, VOCAB, causal_lm, value_model
from tests.test_candidates import random_head
from tests.test_decoding import EOS, make_prompts
from tests.test_shared_base import three
from utils import beams, decoding, policy_base
from utils.decoding import beam_search, decode
from utils.errors import DataError, UsageError
from utils.graphs import StepGraphs, graphs_for
from utils.growth import TreeShape, grow_trees
from utils.policies import (
    CandidatePolicy,
    MavisPolicy,
    MixturePolicy,
    PromptTablePolicy,
    ReferencePolicy,
    TokenTablePolicy,
)
from utils.shared_base import AdapterStack, StackedLinear

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item"}  # operations
ASKS = {"tolist", "item", "cpu", "numpy", "nonzero", "unique", "masked_select", "__bool__", "__int__", "__float__"}


class Asking(TorchFunctionMode):
    """Refuses calls that wait for the device, which reach a `Tape` as nothing or as something else."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name == "__getitem__" and isinstance(args[1], tuple) else args[1:2]
        masked = name == "__getitem__" and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
        of_counts = name == "repeat_interleave" and isinstance(args[1], torch.Tensor)
        if name in ASKS or masked or of_counts or (name == "where" and len(args) == 1):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return function(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """The operations of a step, in their order, with the very tensors that they had.

    Like a stream that is being captured, it refuses what has to wait for the device; and a tensor that the host has
    made while it was recorded, which would be copied to a device.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.made = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS or "lift" in name:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class TapeRecorder:
    """`CudaRecorder`'s twin: what was recorded is done again by the operations alone, without the Python around them.

    Args:
        state: the tensors that recording must leave as they are, since on a device nothing is done meanwhile.
        kept: all tensors that may be read and are no step's own: the state, and what models and the policy hold.
    """

    def __init__(self, state, kept):
        self.state, self.kept = state, kept
        self.recorded, self.replays = 0, []

    def __call__(self, step):
        before = [(t, t.clone()) for t in self.state()]
        tape = Tape()
        with Asking(), tape:
            step()
        for tensor, old in before:
            tensor.copy_(old)
        self.recorded += 1
        own, known = set(), {t.untyped_storage().data_ptr() for t in self.kept()}
        for function, args, kwargs, result in tape.calls:
            for tensor in tensors((args, kwargs)):
                assert id(tensor) in own or tensor.untyped_storage().data_ptr() in known, f"{function}: from the host"
            own.update(map(id, tensors(result)))

        replays = self.replays

        def replay():
            replays.append(len(tape.calls))
            now = {}  # a tensor of the recording -> this time's

            def current(x):
                return now.get(id(x), x) if isinstance(x, torch.Tensor) else x

            for function, args, kwargs, result in tape.calls:
                again = function(*tree_map(current, args), **tree_map(current, kwargs))
                now.update(zip(map(id, tensors(result)), tensors(again), strict=True))

        return replay


def tensors(nested):
    return [x for x in tree_flatten(nested)[0] if isinstance(x, torch.Tensor)]


def recorded(policy):
    """A policy whose steps are recorded, and its recorder."""

    def state():
        return list(policy.graphs._views.values())

    def kept():
        modules = [reader.model for reader in policy.readers] + [h for r in policy.value_readers for h in r.heads]
        modules += [head for of_reader in getattr(policy, "candidate_heads", []) for head in of_reader]
        modules += [reader.backbone.backbone for reader in policy.value_readers if reader.members is not None]
        own = [x for x in vars(policy).values() if isinstance(x, torch.Tensor)]
        layers = (layer for m in modules for layer in m.modules() if isinstance(layer, StackedLinear))
        own += [x for layer in layers for chosen in layer._chosen.values() for x in chosen or ()]
        return state() + own + [t for m in modules for t in itertools.chain(m.parameters(), m.buffers())]

    recorder = TapeRecorder(state, kept)
    policy.graphs = StepGraphs(recorder)
    return policy, recorder


class Maker:
    """Policies of small models, on one device and in one precision."""

    def __init__(self, name="llama_full", device="cpu", dtype=torch.float64):
        self.name, self.device, self.dtype = name, torch.device(device), dtype

    def language(self, seed=0):
        return causal_lm(self.name, seed, self.dtype).to(self.device)

    def values(self):
        return [value_model(self.name, i, self.dtype, pooling=p).to(self.device) for i, p in ((1, "last"), (2, "mean"))]

    def reference(self):
        return ReferencePolicy(self.language(), top_k=6)

    def mavis(self, **more):
        tilt = dict(beta=3.0, top_k=8, temperature=0.8) | more
        return MavisPolicy(self.language(), dict(zip("ab", self.values(), strict=True)), {"a": 0.3, "b": 0.7}, **tilt)

    def unnormalised(self):
        return self.mavis(normalization="none")

    def stacked(self):
        stack, models = AdapterStack(), three(self.name, "mean")
        members = [stack.add(model, self.device, self.dtype) for model in models]
        return MavisPolicy(self.language(), members, [0.2, 0.3, 0.5], beta=3.0, top_k=6)

    def candidates(self):
        values = self.values()
        heads = [random_head(model.cpu(), i).to(self.device) for i, model in enumerate(values)]
        values = [model.to(self.device) for model in values]
        return CandidatePolicy(self.language(), values, heads, [0.6, 0.4], beta=2.0, top_k=6)

    def mixture(self):
        return MixturePolicy([self.language(), self.language(5)], [0.4, 0.6], top_k=6)

    def token_table(self):
        return TokenTablePolicy(self.language(), [torch.linspace(-1, 1, VOCAB)], [1.0], beta=2.0, top_k=6)

    def prompt_table(self):
        def table_of(prompt):
            return torch.arange(VOCAB) % (2 + len(prompt) % 5)

        return PromptTablePolicy(self.language(), table_of, beta=2.0, top_k=6)


KINDS = ["reference", "mavis", "unnormalised", "stacked", "candidates", "mixture", "token_table", "prompt_table"]


def same(completions, expected, tolerance=1e-8):
    for ours, theirs in zip(completions, expected, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.finished == theirs.finished
        assert ours.log_prob == pytest.approx(theirs.log_prob, abs=tolerance)
        assert ours.step_log_ratios == pytest.approx(theirs.step_log_ratios, abs=tolerance)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Short texts come to several widths."""
    monkeypatch.setattr(policy_base, "GRAPH_COLUMNS", 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_steps_decode_the_same_on_every_architecture(name):
    """Rows are refilled, move, and become fewer; texts grow over several widths of the cache."""
    prompts, keys = make_prompts(9), [(0, i, 1) for i in range(9)]
    how = dict(keys=keys, max_new_tokens=20, eos_token_id=[EOS, 9, 11], batch_size=4)
    expected = decode(Maker(name).mavis(), prompts, **how)
    policy, recorder = recorded(Maker(name).mavis())
    same(decode(policy, prompts, **how), expected)
    assert {c.finished for c in expected} == {True, False} and len(recorder.replays) > 3 * recorder.recorded > 0
    same(decode(policy, prompts, **how), expected)
    made = recorder.recorded
    same(decode(policy, prompts, **how), expected)
    assert recorder.recorded == made  # every shape is known by now


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_decode_the_same_under_every_policy(kind):
    prompts, keys = make_prompts(7, seed=4), [(1, i) for i in range(7)]
    how = dict(keys=keys, max_new_tokens=16, eos_token_id=EOS, batch_size=3, suppress_first_eos=True)
    expected = decode(getattr(Maker(), kind)(), prompts, **how)
    policy, recorder = recorded(getattr(Maker(), kind)())
    same(decode(policy, prompts, **how), expected)
    assert len(recorder.replays) > 10


def test_trees_grow_the_same_with_recorded_steps():
    prompts, shape = dict(enumerate(make_prompts(3, seed=2))), TreeShape(3, 2, 3, 20)
    texts, how = dict.fromkeys(prompts, ""), dict(seed=3, eos_token_id=[EOS, 9], batch_size=4)
    expected = list(grow_trees(Maker("qwen2").mavis(), prompts, texts, shape, **how))
    policy, recorder = recorded(Maker("qwen2").mavis())
    for ours, theirs in zip(grow_trees(policy, prompts, texts, shape, **how), expected, strict=True):
        assert ours.parent.tolist() == theirs.parent.tolist()
        assert [list(t) for t in ours.tokens] == [list(t) for t in theirs.tokens]
    assert len(recorder.replays) > 10


@pytest.mark.parametrize("kind", ["mavis", "candidates", "token_table"])
def test_recorded_steps_search_the_same_with_beams(kind, monkeypatch):
    """Prompts end at different times; on a CPU the host looks at each step, elsewhere rarely."""
    prompts, keys = make_prompts(5, seed=4), [(1, i) for i in range(5)]
    how = dict(keys=keys, num_beams=2, num_samples=3, num_return=4, max_new_tokens=14, batch_size=6)
    how["eos_token_id"] = list(range(3, VOCAB, 2))
    expected = beam_search(getattr(Maker(), kind)(), prompts, **how)
    assert min(max(len(c.token_ids) for c in found) for found in expected) < 8  # a prompt ended early
    for look_every in (1, 5):
        monkeypatch.setattr(beams, "steps_between_looks", lambda device, n=look_every: n)
        policy, recorder = recorded(getattr(Maker(), kind)())
        for found in (beam_search(policy, prompts, **how), beam_search(getattr(Maker(), kind)(), prompts, **how)):
            for ours, theirs in zip(found, expected, strict=True):
                assert [(c.token_ids, c.finished) for c in ours] == [(c.token_ids, c.finished) for c in theirs]
                for a, b in zip(ours, theirs, strict=True):
                    assert (a.value, a.log_ratio) == pytest.approx((b.value, b.log_ratio), abs=1e-8)
        assert len(recorder.replays) > 5


def test_another_text_in_a_place_is_not_what_was_recorded():
    """Recordings are kept over calls with other prompts, other ends of a text, other numbers of rows."""
    policy, recorder = recorded(Maker().mavis())
    for seed, eos, batch_size in ((1, EOS, 3), (2, [9], 3), (3, [9, 11, 13], 5), (4, None, 2), (1, EOS, 3)):
        prompts = make_prompts(5, seed=seed)
        how = dict(keys=[(seed, i) for i in range(5)], max_new_tokens=12, eos_token_id=eos, batch_size=batch_size)
        same(decode(policy, prompts, **how), decode(Maker().mavis(), prompts, **how))


def test_a_step_that_waits_for_the_device_or_brings_a_tensor_from_the_host_is_refused():
    class Looking(ReferencePolicy):
        def _candidates(self, logits, forbidden=None):
            p_ref, token_ids = super()._candidates(logits, forbidden)
            return (p_ref, token_ids) if float(p_ref.sum()) else (p_ref * 0, token_ids)

    class Masking(ReferencePolicy):
        def _candidates(self, logits, forbidden=None):
            p_ref, token_ids = super()._candidates(logits, forbidden)
            return p_ref + p_ref[p_ref > 2].sum(), token_ids

    class Listing(ReferencePolicy):
        def _candidates(self, logits, forbidden=None):
            p_ref, token_ids = super()._candidates(logits, forbidden)
            return p_ref * len(p_ref[0].tolist()) / p_ref.shape[1], token_ids

    class Bringing(ReferencePolicy):
        def _candidates(self, logits, forbidden=None):
            return super()._candidates([logits[0] + torch.tensor([0.5], dtype=torch.float64)], forbidden)

    for kind in (Looking, Masking, Listing, Bringing):
        policy, _ = recorded(kind(causal_lm("llama_full"), top_k=6))
        with pytest.raises(DataError, match="cannot be recorded as a CUDA graph .*leave --cuda_graphs out"):
            decode(policy, [[5, 6]], keys=[(0,)], max_new_tokens=6, eos_token_id=None, batch_size=1)


def test_values_that_are_not_finite_stop_recorded_steps_too():
    policy, _ = recorded(Maker().mavis())
    with torch.no_grad():
        policy.value_readers[0].heads[0].weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="prompt 1: the values of a are not finite"):
        decode(policy, [[5, 6]], keys=[(0, 1)], max_new_tokens=6, eos_token_id=None, batch_size=1)


def test_what_is_in_its_place_is_not_copied_again():
    """A cache of the paper's models has gigabytes: between two steps in which nothing happened nothing may move it."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("copy_", "clone"):
                copied.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    policy, recorder = recorded(Maker().mavis())
    rows, ends, copied = decoding._Rows(2, 20, policy.device, 3), {"eos": torch.tensor([EOS])}, []
    policy.open(2)
    policy.load([0, 1], policy.prefill([[5, 6, 7], [8, 9]]))
    with torch.inference_mode():
        for _ in range(3):
            decoding._recorded_step(policy, rows, ends)
        with Copies():
            decoding._recorded_step(policy, rows, ends)
    assert recorder.replays and max(copied, default=0) <= max(x.numel() for x in (policy.p_ref, rows.tokens))


def test_no_memory_while_recording_is_said_as_no_memory():
    def record(step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    policy = Maker().reference()
    policy.graphs = StepGraphs(record)
    with pytest.raises(torch.OutOfMemoryError):
        decode(policy, [[5, 6]], keys=[(0, 1)], max_new_tokens=6, eos_token_id=None, batch_size=1)


def test_graphs_are_made_where_a_gpu_is_and_they_are_wanted():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert graphs_for(cpu, None, True) is None and graphs_for(cpu, False, True) is None
    assert graphs_for(gpu, None, False) is None and graphs_for(gpu, False, True) is None
    assert isinstance(graphs_for(gpu, None, True), StepGraphs) and isinstance(graphs_for(gpu, True, False), StepGraphs)
    with pytest.raises(UsageError, match="--cuda_graphs needs an NVIDIA GPU, and the device is cpu"):
        graphs_for(cpu, True, True)


def on_gpu(test):
    """For machines that have one: `bash benchmarks/gpu.sh`, or `pytest -m gpu`."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


@on_gpu
@pytest.mark.parametrize("name", ["llama_full", "llama_grouped_tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs_decode_the_same(kind, name):
    """On a GPU, with the recorder that is used there."""
    prompts, keys = make_prompts(9, seed=4), [(1, i) for i in range(9)]
    how = dict(keys=keys, max_new_tokens=24, eos_token_id=[EOS, 9], batch_size=4)
    expected = decode(getattr(Maker(name, "cuda"), kind)(), prompts, **how)
    same(expected, decode(getattr(Maker(name), kind)(), prompts, **how), tolerance=1e-6)
    policy = getattr(Maker(name, "cuda"), kind)()
    policy.graphs = graphs_for(policy.device, True, False)
    for _ in range(3):
        same(decode(policy, prompts, **how), expected, tolerance=1e-6)
    assert any(policy.graphs._recorded.values())
    if hasattr(policy, "beta"):
        how = dict(keys=keys, num_beams=3, num_return=3, max_new_tokens=24, eos_token_id=9, batch_size=12)
        search = beam_search(getattr(Maker(name, "cuda"), kind)(), prompts, **how)
        for ours, theirs in zip(beam_search(policy, prompts, **how), search, strict=True):
            assert [(c.token_ids, c.finished) for c in ours] == [(c.token_ids, c.finished) for c in theirs]


@on_gpu
@pytest.mark.parametrize("name", ["llama_full", "llama_grouped_tied"])
def test_cuda_graphs_in_half_precision_do_what_the_same_steps_do_unrecorded(name):
    """Shapes and kernels are the same."""

    class Unrecorded(StepGraphs):
        def run(self, places, step):
            self._recorded.clear()
            super().run(places, step)

    prompts, keys = make_prompts(9, seed=4), [(1, i) for i in range(9)]
    how = dict(keys=keys, max_new_tokens=24, eos_token_id=[EOS, 9], batch_size=4)
    unrecorded, policy = (Maker(name, "cuda", torch.bfloat16).mavis() for _ in range(2))
    unrecorded.graphs = Unrecorded(None)
    policy.graphs = graphs_for(policy.device, True, False)
    for _ in range(3):
        same(decode(policy, prompts, **how), decode(unrecorded, prompts, **how), tolerance=1e-4)


@on_gpu
def test_recordings_of_several_policies_do_not_disturb_each_other():
    """In turns, while one of them grows and loses its recordings, and another one goes."""
    how = dict(eos_token_id=None, batch_size=3)
    policies = [Maker(device="cuda").mavis() for _ in range(3)]
    for policy in policies:
        policy.graphs = graphs_for(policy.device, True, False)
    for length in (4, 20, 44, 8, 60):
        prompts, keys = make_prompts(5, seed=length), [(length, i) for i in range(5)]
        for n, policy in enumerate(policies):
            tokens = length if n == 0 else 12
            expected = decode(Maker(device="cuda").mavis(), prompts, keys=keys, max_new_tokens=tokens, **how)
            same(decode(policy, prompts, keys=keys, max_new_tokens=tokens, **how), expected, tolerance=1e-6)
        if length == 44:
            del policies[2], policy


def test_a_policy_and_its_recordings_go_together():
    policy, _ = recorded(Maker().reference())
    decode(policy, [[5, 6]], keys=[(0,)], max_new_tokens=6, eos_token_id=None, batch_size=1)
    graphs, cache = weakref.ref(policy.graphs), weakref.ref(policy.caches[0].store)
    policy.graphs._record = None  # the test's own recorder holds the policy
    del policy, _
    assert graphs() is None and cache() is None  # before the next point's are made; no collection was needed
