"""Costs against what PyTorch counts, and the cost model's tokens against trees that are grown."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BartConfig, DistilBertConfig

from tests.models_for_tests import CONFIGS, VOCAB, value_model
from utils import costs


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    return counter.get_total_flops()


def eager(name):
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    return model, torch.randint(3, VOCAB, (2, 7))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_forward_pass_has_the_operations_that_are_counted(name):
    """PyTorch counts whole squares of attention, so a pass with no cache is compared with its full number of pairs."""
    model, ids = eager(name)
    pairs = 7 * 7 - costs.attention_pairs(7)  # what causal attention could leave out
    ours = costs.forward_flops(model.config, 7, head_tokens=7) + costs.attention_flops(model.config, pairs)
    assert counted(lambda: model(input_ids=ids, use_cache=False)) == 2 * ours


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_step_behind_a_cache_has_the_operations_that_are_counted(name):
    model, ids = eager(name)
    with torch.inference_mode():
        past = model(input_ids=ids, use_cache=True).past_key_values
    step = counted(lambda: model(input_ids=ids[:, :1], past_key_values=past, use_cache=True))
    assert step == 2 * costs.forward_flops(model.config, 1, 7, head_tokens=1)


def test_encoders_and_encoder_decoders_are_counted_too():
    ids = torch.randint(3, VOCAB, (1, 9))
    small = dict(vocab_size=VOCAB, max_position_embeddings=32)
    bert = DistilBertConfig(**small, dim=32, hidden_dim=48, n_layers=3, n_heads=4, attn_implementation="eager")
    model = AutoModelForSequenceClassification.from_config(bert, attn_implementation="eager").eval()
    head = 2 * 32 * 32 + 2 * 32 * bert.num_labels  # of the classifier, for one token
    assert counted(lambda: model(input_ids=ids)) == costs.forward_flops(bert, 9) + head
    bart = BartConfig(**small, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_labels=2)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(bart, attn_implementation="eager").eval()
    ids[0, -1] = bart.eos_token_id
    ids[0, :-1] = ids[0, :-1].clamp(min=4)
    unseen = costs.attention_flops(bart, 81 - costs.attention_pairs(9))
    head = 2 * 32 * 32 + 2 * 32 * 2
    ours = costs.forward_flops(bart, 9) + unseen
    assert ours <= counted(lambda: model(input_ids=ids)) <= ours + 9 * head


def test_parameters_and_caches_are_those_of_a_model():
    model, ids = eager("llama_grouped_tied")
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    assert costs.matrix_parameters(model.config) == sum(matrices.values())
    assert costs.matrix_parameters(model.config, num_layers=2, head=True) == (
        sum(n for name, n in matrices.items() if "layers.2" not in name) + VOCAB * 32
    )
    cache = model(input_ids=ids[:1], use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert costs.cache_bytes(model.config, 7, width=4) == sum(t.numel() * t.element_size() for t in tensors)


def test_an_adapter_and_its_training_are_counted():
    """The backward pass of frozen weights under an adapter, as PyTorch counts it, less what the first layer saves:
    below it nothing is trained, so that its queries, keys and values have no gradients of their inputs."""
    from peft import LoraConfig, get_peft_model

    from utils.config import LoraSpec

    base = value_model("llama_full", dtype=torch.float32, layers=3)
    modules = list(LoraSpec(4, 8).target_modules)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=modules))
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert costs.adapter_parameters(base.config, 4) == adapter
    base.set_attn_implementation("eager")
    ids = torch.randint(3, VOCAB, (1, 24))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    unseen = costs.attention_flops(base.config, 24 * 24 - costs.attention_pairs(24))
    saved = 2 * 24 * 3 * (32 * 32 + 4 * 32)
    head = 3 * 2 * 24 * 32  # the value head, on every token
    ours = costs.training_flops(base.config, 24, rank=4) + 3 * unseen - saved
    assert abs(counter.get_total_flops() - ours) <= head
    assert costs.training_flops(base.config, 24) == 3 * costs.forward_flops(base.config, 24)


def test_an_unknown_architecture_is_refused():
    from transformers import T5Config

    with pytest.raises(ValueError, match="'t5' model"):
        costs.shape_of(T5Config())
