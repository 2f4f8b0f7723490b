"""What becomes of a family, and what should."""

from __future__ import annotations

import re

import torch
from configs import tiny_model
from transformers import PreTrainedModel

import seerattn
from seerattn import AttnGateConfig
from seerattn.hf.state import layer_states

SERVED, PARTLY, REFUSED, LEFT_OUT = "served", "partly", "refused", "left out"
GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
OTHER_KEYS = "in one call only, its cache holds other keys than one call has"
# Of a refusal, a pattern of its sentence; what transformers itself raises is its own affair. A family whose verdict
# changes fails its test, and so does transformers with a family that is not here.
_TABLE = {
    SERVED: """
        apertus, arcee, aria, aria_text, aya_vision, bart, bert, bert-generation, biogpt, bitnet, blenderbot,
        blenderbot-small, camembert, cohere, cohere2_vision, cosmos3_omni, ctrl, data2vec-text, dbrx, deepseek_vl,
        deepseek_vl_hybrid, dots1, electra, emu3, ernie, ernie4_5, ernie4_5_moe, falcon_h1, flex_olmo, fuyu, gemma,
        glm, glm4, glm4_moe, glm4v, glm4v_moe, got_ocr2, gpt-sw3, gpt2, gpt_bigcode, gpt_neox, granite, granitemoe,
        granitemoeshared, helium, hy_v3, hyperclovax, hyperclovax_vision_v2, idefics2, idefics3, internlm3,
        internvl, iquestcoder, jais2, jetmoe, laguna, lfm2, lfm2_vl, lighton_ocr, llama, llava, llava_next,
        llava_next_video, llava_onevision, marian, mbart, mellum, minimax_m2, minimax_m3_vl, minimax_m3_vl_text,
        ministral3, mistral, mistral3, mixtral, moss_transcribe_diarize, nanochat, nemotron, olmo, olmo2, olmoe,
        opt, ovis2, paddleocr_vl, pegasus, persimmon, phi, phi3, phi4_multimodal, phimoe, plbart, qianfan_ocr,
        qwen2, qwen2_5_omni_thinker, qwen2_5_vl, qwen2_moe, qwen2_vl, qwen3, qwen3_moe, qwen3_omni_moe_thinker,
        qwen3_vl, qwen3_vl_moe, roberta, roberta-prelayernorm, roc_bert, seed_oss, shieldgemma2, smollm3, smolvlm,
        solar_open, stablelm, starcoder2, step3p7, video_llama_3, video_llava, vipllava, whisper, xlm-roberta,
        xlm-roberta-xl, xmod, zaya
    """,
    f"{PARTLY}: 1 of 4 layers, not conv": "lfm3, lfm3_vl",
    f"{PARTLY}: 1 of 4 layers, not linear_attention": """
        olmo_hybrid, qwen3_5, qwen3_5_moe, qwen3_5_moe_text, qwen3_5_text, qwen3_next
    """,
    f"{PARTLY}: 1 of 4 layers, not linear_attention and mlp and moe": "nemotron_h",
    f"{PARTLY}: 1 of 4 layers, not sliding_attention": """
        afmoe, beam, cohere2, cohere2_moe, cwm, exaone4, exaone_moe, gemma4_text (heads of 64), granite_swa,
        granitemoe_swa, mimo_v2_flash (values of 32), olmo3
    """,
    f"{PARTLY}: 2 of 4 layers, not conv": "lfm2_moe",
    f"{PARTLY}: 2 of 4 layers, not linear_attention": "granitemoehybrid, granitemoehybrid (RoPE), minimax",
    f"{PARTLY}: 2 of 4 layers, not linear_attention; {OTHER_KEYS}": "bamba, jamba",
    f"{PARTLY}: 2 of 4 layers, not sliding_attention": """
        cohere_compass_text, gemma2, gemma3, gemma3_text, gemma3n_text, gpt_oss, kolibri1, ministral,
        modernbert-decoder, vaultgemma
    """,
    f"{PARTLY}: 3 of 4 layers, not those of another kind": "mllama",
    f"{PARTLY}: 3 of 4 layers, not sliding_attention": "flint",
    f"{REFUSED}: a mask that are not its own": """
        axk2, deepseek_v32, doge, dots3_note_text, git, glm_moe_dsa, hy_v4,
        paligemma, qwen4_exp_text
    """,
    f"{REFUSED}: an encoder-decoder": "t5",
    f"{REFUSED}: are all sliding-window": "deepseek_v4, mistral (window of 32), recurrent_gemma",
    f"{REFUSED}: be called once a forward": "diffllama, hrm_text",
    f"{REFUSED}: have a layer_idx of their own": "zamba, zamba2, zamba2 (RoPE)",
    f"{REFUSED}: multi-head latent attention": """
        axk1, bailing_hybrid, deepseek_v2, deepseek_v3, kimi_linear, longcat_flash, mimo_v2_flash, minicpm3, youtu
    """,
    f"{REFUSED}: must be causal": "bigbird_pegasus",
    f"{REFUSED}: must be undone exactly": "glm4_moe_lite, hunyuan_v1_dense, hunyuan_v1_moe, mistral4",
    f"{REFUSED}: must (take rotary tables|make its masks)": "llama4, llama4_text, moshi",
    f"{REFUSED}: the head dim must be 32 to 256, got 512": "gemma4, gemma4_text, gemma4_unified, gemma4_unified_text",
    f"{REFUSED}: the softmax of scaled products": "inkling2_text, inkling_text",
    f"{REFUSED}: through the transformers attention interface": """
        big_bird, bloom, codegen, cpmant, falcon, falcon (new decoder), falcon_mamba, gpt_neo, gpt_neox_japanese,
        gptj, mamba, mamba2, megatron-bert, mpt, mvp, openai-gpt, prophetnet, reformer, rembert, roformer, rwkv,
        trocr, xglm, xlm, xlnet, xlstm
    """,
    LEFT_OUT: """
        blt, dots3_note, gemma3n, gemma4_assistant, gemma4_unified_assistant, musicgen, musicgen_melody,
        qwen4_exp
    """,
}
EXPECTED = {name: verdict for verdict, names in _TABLE.items() for name in " ".join(names.split()).split(", ")}
# Transformers itself gives their rows something else when padding stands on the left: positions are those of slots.
SLOT_POSITIONS = ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart", "whisper")
# They count positions by ids that are not padding, and otherwise when they are given.
OWN_POSITIONS = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def verdict(name: str) -> str:
    """What `seerattn.attach` makes of a family: one of four words, and why it is not the first."""
    try:
        model = tiny_model(name)
        if not model.config.is_encoder_decoder:
            model(input_ids=torch.arange(3, 73)[None])
    except Exception as error:
        # Whatever transformers itself raises, the family cannot be tried.
        return f"{LEFT_OUT}: {type(error).__name__}: {_line(error)}"
    return verdict_of(model)


def verdict_of(model: PreTrainedModel) -> str:
    """The verdict of a model that runs, which is left without gates."""
    try:
        gated = seerattn.attach(model, GATE)
    except ValueError as error:
        return f"{REFUSED}: {_line(error)}"
    served = layer_states(gated)
    seerattn.detach(gated)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    numbers = {state.layer for state in served}
    rest = [number for number in range(config.num_hidden_layers) if number not in numbers]
    reasons = []
    if rest:
        others = sorted({kinds[number] for number in rest}) if kinds else ["those of another kind"]
        reasons.append(f"{len(served)} of {config.num_hidden_layers} layers, not {' and '.join(others)}")
    if any(state.found.not_cached for state in served):
        reasons.append(f"in one call only, {next(s.found.not_cached for s in served if s.found.not_cached)}")
    return f"{PARTLY}: {'; '.join(reasons)}" if reasons else SERVED


def agrees(found: str, expected: str) -> bool:
    """Whether a verdict is the one that the table has."""
    kind, _, why = expected.partition(": ")
    return found == expected or (
        kind in (REFUSED, LEFT_OUT) and found.startswith(f"{kind}: ") and bool(re.search(why, found))
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
