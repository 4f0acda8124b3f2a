"""Value models whose adapters are read side by side on one base are the models that they are apart."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models_for_tests import CONFIGS, causal_lm, value_model
from utils.candidates import CandidateHead
from utils.decoding import beam_search, decode
from utils.policies import CandidatePolicy, MavisPolicy
from utils.shared_base import AdapterStack, StackedLinear

EOS = 2
TARGETS = {"gpt2": ["c_attn", "c_fc"], "gpt_neox": ["query_key_value", "dense"]}
CPU, DOUBLE = torch.device("cpu"), torch.float64


def adapted(base, seed, rank=3, targets=None, **options):
    """A copy of a base with a random adapter whose effect is large, and a head of its own."""
    config = LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=["score"], **options
    )
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model.double().eval()


def three(name, pooling="last"):
    """Three value models on one base, of different ranks, two of them with layers that the others do not change."""
    base = value_model(name, 5, pooling=pooling)
    targets = TARGETS.get(name, ["q_proj", "down_proj"])
    wanted = [targets[:1], targets, targets[1:]]
    convolution = {"fan_in_fan_out": True} if name == "gpt2" else {}  # GPT-2's name for a transposed linear layer
    return [adapted(base, seed, rank=2 + seed, targets=t, **convolution) for seed, t in enumerate(wanted)]


def stacked(models):
    stack = AdapterStack()
    return [stack.add(copy.deepcopy(model), CPU, DOUBLE) for model in models]


def prompts_of(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (n,), generator=generator).tolist()
    return [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]


def run(policy, n=7, batch_size=3, **options):
    prompts, keys = prompts_of(n), [(1, i) for i in range(n)]
    ends = [EOS, *range(9, 61, 6)]  # texts of many lengths, so that rows are refilled
    settings = dict(max_new_tokens=10, eos_token_id=ends, batch_size=batch_size, trace=True) | options
    return decode(policy, prompts, keys=keys, **settings)


def assert_equal(got, expected):
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one.steps, other.steps, strict=True):
            torch.testing.assert_close(a["values"], b["values"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_stacked_models_decode_as_merged_ones_do(name, pooling):
    reference, models = causal_lm(name), three(name, pooling)
    merged = [copy.deepcopy(m).merge_and_unload() for m in models]
    weights, options = [0.2, 0.3, 0.5], dict(beta=3.0, top_k=6, normalization="none")
    policy = MavisPolicy(reference, stacked(models), weights, **options)
    assert len(policy.value_readers) == 1 and policy.value_readers[0].copies == 3
    expected = run(MavisPolicy(reference, merged, weights, **options))
    assert_equal(run(policy), expected)
    plain = run(MavisPolicy(reference, [value_model(name, 5, pooling=pooling)] * 3, weights, **options))
    assert [c.token_ids for c in plain] != [c.token_ids for c in expected]  # the adapters say something


def test_any_members_in_any_order_from_one_stack_with_other_models_between():
    reference, models = causal_lm("llama_grouped_tied"), three("llama_grouped_tied")
    merged, members = [copy.deepcopy(m).merge_and_unload() for m in models], stacked(models)
    other = value_model("llama_full", 9)
    options = dict(beta=3.0, top_k=6)
    for order in ([2, 0], [1], [0, 1, 2], [2, 0]):  # the first again, after others were in use
        of_stack = MavisPolicy(reference, [members[i] for i in order] + [other], [*range(1, len(order) + 2)], **options)
        apart = MavisPolicy(reference, [merged[i] for i in order] + [other], [*range(1, len(order) + 2)], **options)
        assert len(of_stack.value_readers) == 2
        assert_equal(run(of_stack), run(apart))
    between = MavisPolicy(reference, [members[0], other, members[1]], [0.5, 0.2, 0.3], **options)
    assert_equal(run(between), run(MavisPolicy(reference, [merged[0], other, merged[1]], [0.5, 0.2, 0.3], **options)))


@pytest.mark.parametrize("order", [[0], [1], [2, 0]])
@pytest.mark.parametrize("kind", ["stacked", "heads alone"])
def test_a_shared_backbone_reads_with_grouped_attention_whoever_is_first(kind, order):
    if kind == "stacked":
        members = stacked(three("llama_grouped_tied"))
        backbone = members[0].stack.backbone
    else:  # value models whose head alone was trained, as `load_value_models` lets them share
        members = [value_model("llama_grouped_tied", seed) for seed in range(3)]
        backbone = members[0].model
        for member in members[1:]:
            member.model = backbone
    seen = []
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(module.config._attn_implementation))
    run(MavisPolicy(causal_lm("llama_grouped_tied"), [members[i] for i in order], [1.0] * len(order), beta=3.0))
    assert set(seen) == {"mavis_grouped"} and backbone.config._attn_implementation == "sdpa"


def test_a_member_that_comes_later_changes_no_earlier_one():
    reference, models = causal_lm("llama_full"), three("llama_full")
    stack = AdapterStack()
    first = stack.add(copy.deepcopy(models[0]), CPU, DOUBLE)
    before = run(MavisPolicy(reference, [first], [1.0], beta=3.0, top_k=6))
    last = stack.add(copy.deepcopy(models[2]), CPU, DOUBLE)  # it changes layers that the first does not
    assert_equal(run(MavisPolicy(reference, [first], [1.0], beta=3.0, top_k=6)), before)
    merged = copy.deepcopy(models[2]).merge_and_unload()
    expected = run(MavisPolicy(reference, [merged], [1.0], beta=3.0, top_k=6))
    assert_equal(run(MavisPolicy(reference, [last], [1.0], beta=3.0, top_k=6)), expected)


def test_the_base_reads_once_for_all_members():
    reference, members = causal_lm("llama_full"), stacked(three("llama_full"))
    rows = []
    layer = members[0].stack.layers["layers.0.self_attn.q_proj"]
    layer.layer.register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].shape[:2]))
    run(MavisPolicy(reference, members, [0.2, 0.3, 0.5], beta=3.0, top_k=6), n=1, batch_size=1, eos_token_id=None)
    assert rows[0] == (3, len(prompts_of(1)[0])) and set(rows[1:]) == {(3, 6)} and len(rows) == 11


def test_the_work_counts_every_copy():
    reference, models = causal_lm("llama_full"), three("llama_full")
    merged = [copy.deepcopy(m).merge_and_unload() for m in models]
    works = [MavisPolicy(reference, v, [0.2, 0.3, 0.5], beta=1.0, top_k=6).work() for v in (stacked(models), merged)]
    assert works[0] == works[1]


def test_beams_fork_every_members_cache():
    reference, models = causal_lm("llama_grouped_tied"), three("llama_grouped_tied", "mean")
    merged = [copy.deepcopy(m).merge_and_unload() for m in models]
    found = []
    for values in (stacked(models), merged):
        policy = MavisPolicy(reference, values, [0.2, 0.3, 0.5], beta=3.0, top_k=6)
        prompts, keys = prompts_of(3), [(4, i) for i in range(3)]
        options = dict(max_new_tokens=9, eos_token_id=EOS, num_beams=3, num_return=2, batch_size=6)
        found.append(beam_search(policy, prompts, keys=keys, **options))
    assert [[c.token_ids for c in beams] for beams in found[0]] == [[c.token_ids for c in beams] for beams in found[1]]


def test_candidate_heads_read_each_members_own_state():
    reference, models = causal_lm("llama_grouped_tied"), three("llama_grouped_tied")
    merged = [copy.deepcopy(m).merge_and_unload() for m in models]
    generator = torch.Generator().manual_seed(0)

    def head():
        table, state, token = (torch.randn(*n, generator=generator, dtype=DOUBLE) for n in ((61,), (2, 32), (2, 32)))
        embeddings = merged[0].get_input_embeddings().weight.detach()
        return CandidateHead(table, state, token, embeddings=embeddings)

    heads = [head() for _ in models]
    options = dict(beta=3.0, top_k=6)
    policies = [CandidatePolicy(reference, v, heads, [0.2, 0.3, 0.5], **options) for v in (stacked(models), merged)]
    assert_equal(run(policies[0]), run(policies[1]))


def test_single_precision_keeps_to_a_small_error():
    reference, models = causal_lm("llama_grouped_tied", dtype=torch.float32), three("llama_grouped_tied")
    merged = [copy.deepcopy(m).merge_and_unload().float() for m in models]
    stack = AdapterStack()
    members = [stack.add(copy.deepcopy(m), CPU, torch.float32) for m in models]
    steps = []
    for values in (members, merged):
        policy = MavisPolicy(reference, values, [0.2, 0.3, 0.5], beta=3.0, top_k=6, normalization="none")
        policy.open(2)
        policy.load([0, 1], policy.prefill(prompts_of(2)))
        steps.append(policy.distribution().values)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "no plain LoRA"),
        ({"lora_bias": True}, "no plain LoRA"),
        ({"targets": "all"}, "no part of"),
        ({"bias": "lora_only"}, "biases are trained"),
        ({"modules_to_save": ["embed_tokens"]}, "a model.embed_tokens of its own"),
    ],
)
def test_what_is_more_than_a_low_rank_update_of_the_backbone_is_refused(options, said):
    targets = ["q_proj"]
    if options.pop("targets", None):
        targets, options = ["q_proj", "score"], {"modules_to_save": None}
    config = LoraConfig(task_type=None, r=2, target_modules=targets, **options)
    model = get_peft_model(value_model("qwen2"), config)
    with pytest.raises(ValueError, match=said):
        AdapterStack().add(model, CPU, DOUBLE)


def test_a_layer_that_no_member_in_use_changes_is_the_base_alone():
    layer = StackedLinear(torch.nn.Linear(4, 5))
    layer.updates = [None, (torch.ones(4, 2), torch.ones(2, 5))]
    x = torch.randn(6, 3, 4)
    layer.use((0, 0))
    assert torch.equal(layer(x), layer.layer(x))
    layer.use((0, 1))
    changed = (layer(x) - layer.layer(x)).detach()
    assert torch.equal(changed[::2], torch.zeros(3, 3, 5))
    torch.testing.assert_close(changed[1::2], (2 * x.sum(-1, keepdim=True)[1::2]).expand(3, 3, 5))
