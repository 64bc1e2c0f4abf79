"""Small models with random weights, built on the fly: every test of the package takes its models from here."""

import peft
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AriaTextConfig,
    AriaTextForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mixora.routing import Tokens

VOCABULARY = 64
WIDTH = 32
INNER = 48


def _decoder(model_class, config_class, layers=2, seed=0, **changes):
    """Hidden 32, 4 heads of 8 of which 2 for keys and values, feed-forward 48."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"num_hidden_layers": layers, "max_position_embeddings": 64, "use_cache": False}
    return model_class(config_class(**{"vocab_size": VOCABULARY, **sizes, **settings, **changes}))


def tiny_llama(layers=2, seed=0, **changes):
    return _decoder(LlamaForCausalLM, LlamaConfig, layers, seed, **changes)


def tiny_mistral(seed=0, **changes):
    return _decoder(MistralForCausalLM, MistralConfig, seed=seed, **changes)


def tiny_qwen2(seed=0, **changes):
    return _decoder(Qwen2ForCausalLM, Qwen2Config, seed=seed, **changes)


def tiny_qwen3(seed=0):
    return _decoder(Qwen3ForCausalLM, Qwen3Config, seed=seed, head_dim=8)


def tiny_gemma(seed=0):
    return _decoder(GemmaForCausalLM, GemmaConfig, seed=seed, head_dim=8)


def tiny_gemma2(seed=0):
    return _decoder(Gemma2ForCausalLM, Gemma2Config, seed=seed, head_dim=8, query_pre_attn_scalar=8)


def tiny_gemma3(seed=0):
    return _decoder(Gemma3ForCausalLM, Gemma3TextConfig, seed=seed, head_dim=8, query_pre_attn_scalar=8)


def tiny_mixtral(seed=0):
    """Its experts are computed one by one: torch's grouped product takes no float64."""
    return _decoder(MixtralForCausalLM, MixtralConfig, seed=seed, num_local_experts=4, experts_implementation="eager")


def tiny_gpt_oss(seed=0):
    """Its feed-forward part gives router scores beside hidden states."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}
    return _decoder(GptOssForCausalLM, GptOssConfig, seed=seed, **sizes, experts_implementation="eager")


def tiny_qwen3_moe(seed=0):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return _decoder(Qwen3MoeForCausalLM, Qwen3MoeConfig, seed=seed, **sizes, experts_implementation="eager")


def tiny_gemma4_moe(seed=0):
    sizes = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16, "head_dim": 8, "global_head_dim": 8}
    kinds = {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2}
    return _decoder(Gemma4ForCausalLM, Gemma4TextConfig, seed=seed, **sizes, **kinds, experts_implementation="eager")


def tiny_hunyuan_moe(seed=0):
    """One expert for a token in the first layer, three in the second."""
    sizes = {"num_experts": 4, "moe_topk": [1, 3], "head_dim": 8, "experts_implementation": "eager"}
    return _decoder(HunYuanMoEV1ForCausalLM, HunYuanMoEV1Config, seed=seed, **sizes)


def tiny_aria(seed=0):
    sizes = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return _decoder(AriaTextForCausalLM, AriaTextConfig, seed=seed, **sizes)


def tiny_phi(seed=0):
    return _decoder(PhiForCausalLM, PhiConfig, seed=seed, resid_pdrop=0.0)


def tiny_phi3(seed=0):
    return _decoder(Phi3ForCausalLM, Phi3Config, seed=seed, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def tiny_opt(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "num_attention_heads": 4}
    settings = {"num_hidden_layers": 2, "max_position_embeddings": 64, "dropout": 0.0, "use_cache": False}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, **sizes, **settings))


def tiny_vit(seed=0):
    """Images of 8 x 8 in patches of 4: five tokens."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4, "num_hidden_layers": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes, **no_dropout))


def _bert_config(**changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4, "num_hidden_layers": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **{**sizes, **no_dropout, **changes})


def tiny_bert(layers=2, seed=0, **changes):
    torch.manual_seed(seed)
    return BertModel(_bert_config(num_hidden_layers=layers, **changes), add_pooling_layer=False)


def tiny_bert_classifier(layers=2, seed=0, **changes):
    torch.manual_seed(seed)
    return BertForSequenceClassification(_bert_config(num_hidden_layers=layers, **{"num_labels": 3, **changes}))


def tiny_albert(layers=2, seed=0):
    """One block for all layers: what stands in it runs so often in a pass."""
    torch.manual_seed(seed)
    sizes = {"embedding_size": 16, "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    config = AlbertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, num_labels=3, **sizes, **no_dropout)
    return AlbertForSequenceClassification(config)


def tiny_answerer(seed=0):
    torch.manual_seed(seed)
    return BertForQuestionAnswering(_bert_config())


def tiny_roberta_classifier(seed=0):
    torch.manual_seed(seed)
    marks = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = RobertaConfig(**{**_bert_config(num_labels=3).to_diff_dict(), "model_type": "roberta", **marks})
    return RobertaForSequenceClassification(config)


def tiny_gpt2(layers=2, seed=0):
    torch.manual_seed(seed)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    marks = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {"n_embd": WIDTH, "n_layer": layers, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **marks, **no_dropout))


def tiny_t5(layers=2, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": layers, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, **sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **changes)
    )


def tiny_bart(seed=0, **changes):
    torch.manual_seed(seed)
    of_both = {"layers": 1, "attention_heads": 4, "ffn_dim": INNER}
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in of_both.items()}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    settings = {"d_model": WIDTH, "max_position_embeddings": 64, "dropout": 0.0, **sizes, **marks}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **{**settings, **changes}))


class OneLinear(nn.Module):
    """The least that can be adapted: one linear, with a mask at the entrance."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x, attention_mask=None, position_ids=None):
        return self.proj(x)


def token_ids(rows, length, seed=0, low=3):
    """Random token ids [rows, length], none of them a special one."""
    return torch.randint(low, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def fill(model, seed=0, std=0.3, names=("mixora_B", "mixora_router")):
    """Random values for what starts at (or near) zero, or alike, so that experts and routers make a difference."""
    generator, of_downs = (torch.Generator().manual_seed(seed + n) for n in range(2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif "mixora_A_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=of_downs) * parameter.std())
    return model


def adapt(model, config, seed=0, **settings):
    """The model under PEFT with a filled adapter, in training mode."""
    torch.manual_seed(seed)
    return fill(peft.get_peft_model(model, config, **settings), seed).train()


def gradients(model):
    """Copies of all gradients by parameter name; clears them."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def all_real(count, device="cpu"):
    """`count` real tokens of one group."""
    return Tokens(torch.ones(count, dtype=torch.bool, device=device), torch.zeros(count, dtype=torch.long).to(device))
