"""The tensors of ``tensorrt_llm`` as the contract of this project states them, typed from it and not from the facts.

Columns: TensorRT-LLM 0.12, 0.17, 0.19 and 1.x. ``req`` and ``opt`` of inputs, ``x`` of outputs, ``-`` where there is
none; a star: the type is that of the engine's logits. Between the columns: what the tags of tensorrtllm_backend say.
"""

from __future__ import annotations

COLUMNS = ("0.12.0", "0.17.0", "0.19.0", "1.2.1")
INPUTS = """
input_ids                           INT32 [-1]       req    opt    opt    opt
input_lengths                       INT32 [1]        req    req    req    req
request_output_len                  INT32 [1]        req    req    req    req
draft_input_ids                     INT32 [-1]       opt    opt    opt    opt
draft_logits                        FP32 [-1,-1]     opt    opt *  opt *  opt *
end_id                              INT32 [1]        opt    opt    opt    opt
pad_id                              INT32 [1]        opt    opt    opt    opt
stop_words_list                     INT32 [2,-1]     opt    opt    opt    opt
bad_words_list                      INT32 [2,-1]     opt    opt    opt    opt
embedding_bias                      FP32 [-1]        opt    opt    opt    opt
beam_width                          INT32 [1]        opt    opt    opt    opt
temperature                         FP32 [1]         opt    opt    opt    opt
runtime_top_k                       INT32 [1]        opt    opt    opt    opt
runtime_top_p                       FP32 [1]         opt    opt    opt    opt
len_penalty                         FP32 [1]         opt    opt    opt    opt
repetition_penalty                  FP32 [1]         opt    opt    opt    opt
min_length                          INT32 [1]        opt    opt    opt    -
presence_penalty                    FP32 [1]         opt    opt    opt    opt
frequency_penalty                   FP32 [1]         opt    opt    opt    opt
random_seed                         UINT64 [1]       opt    opt    opt    -
return_log_probs                    BOOL [1]         opt    opt    opt    opt
return_context_logits               BOOL [1]         opt    opt    opt    opt
return_generation_logits            BOOL [1]         opt    opt    opt    opt
stop                                BOOL [1]         opt    opt    opt    opt
streaming                           BOOL [1]         opt    opt    opt    opt
prompt_embedding_table              FP16 [-1,-1]     opt    opt    opt    opt
prompt_vocab_size                   INT32 [1]        opt    opt    opt    opt
lora_task_id                        UINT64 [1]       opt    opt    opt    opt
lora_weights                        FP16 [-1,-1]     opt    opt    opt    opt
lora_config                         INT32 [-1,3]     opt    opt    opt    opt
decoder_input_ids                   INT32 [-1]       opt    opt    opt    opt
decoder_input_lengths               INT32 [1]        opt    opt    opt    opt
draft_acceptance_threshold          FP32 [1]         opt    opt    opt    opt
runtime_top_p_min                   FP32 [1]         opt    opt    opt    opt
runtime_top_p_decay                 FP32 [1]         opt    opt    opt    opt
runtime_top_p_reset_ids             INT32 [1]        opt    opt    opt    opt
early_stopping                      BOOL [1]         opt    opt    opt    opt
beam_search_diversity_rate          FP32 [1]         opt    opt    opt    opt
encoder_input_features              FP16 [-1,-1]     -      opt    opt    opt
encoder_output_lengths              INT32 [1]        -      opt    opt    opt
num_return_sequences                INT32 [1]        -      opt    opt    opt
return_kv_cache_reuse_stats         BOOL [1]         -      opt    -      -
exclude_input_in_output             BOOL [1]         -      opt    opt    opt
prompt_table_extra_ids              UINT64 [-1]      -      opt    opt    opt
cross_attention_mask                BOOL [-1,-1]     -      opt    opt    opt
context_phase_params                UINT8 [-1]       -      opt    opt    opt
skip_cross_attn_blocks              BOOL [1]         -      opt    opt    opt
retention_token_range_starts        INT32 [-1]       -      opt    opt    opt
retention_token_range_ends          INT32 [-1]       -      opt    opt    opt
retention_token_range_priorities    INT32 [-1]       -      opt    opt    opt
retention_token_range_durations_ms  INT32 [-1]       -      opt    opt    opt
retention_decode_priority           INT32 [1]        -      opt    opt    opt
retention_decode_duration_ms        INT32 [1]        -      opt    opt    opt
return_perf_metrics                 BOOL [1]         -      -      opt    opt
mrope_rotary_cos_sin                FP32 [-1]        -      -      opt    opt
mrope_position_deltas               INT64 [1]        -      -      opt    opt
guided_decoding_guide_type          STRING [1]       -      -      opt    opt
guided_decoding_guide               STRING [1]       -      -      opt    opt
lookahead_window_size               INT32 [1]        -      -      opt    opt
lookahead_ngram_size                INT32 [1]        -      -      opt    opt
lookahead_verification_set_size     INT32 [1]        -      -      opt    opt
min_tokens                          INT32 [1]        -      -      -      opt
seed                                UINT64 [1]       -      -      -      opt
return_num_input_tokens             BOOL [1]         -      -      -      opt
return_num_output_tokens            BOOL [1]         -      -      -      opt
"""
OUTPUTS = """
output_ids                          INT32 [-1,-1]    x      x      x      x
sequence_length                     INT32 [-1]       x      x      x      x
cum_log_probs                       FP32 [-1]        x      x      x      x
output_log_probs                    FP32 [-1,-1]     x      x      x      x
context_logits                      FP32 [-1,-1]     x      x *    x *    x *
generation_logits                   FP32 [-1,-1,-1]  x      x *    x *    x *
batch_index                         INT32 [1]        x      x      x      x
sequence_index                      INT32 [1]        -      x      x      x
context_phase_params                UINT8 [-1]       -      x      x      x
kv_cache_alloc_new_blocks           INT32 [1]        -      x      x      x
kv_cache_reused_blocks              INT32 [1]        -      x      x      x
kv_cache_alloc_total_blocks         INT32 [1]        -      x      x      x
arrival_time_ns                     INT64 [1]        -      -      x      x
first_scheduled_time_ns             INT64 [1]        -      -      x      x
first_token_time_ns                 INT64 [1]        -      -      x      x
last_token_time_ns                  INT64 [1]        -      -      x      x
acceptance_rate                     FP32 [1]         -      -      x      x
total_accepted_draft_tokens         INT32 [1]        -      -      x      x
total_draft_tokens                  INT32 [1]        -      -      x      x
num_input_tokens                    INT32 [1]        -      -      -      x
num_output_tokens                   INT32 [1]        -      -      -      x
"""
BETWEEN = {
    "0.13.0": ("0.12.0", {"prompt_table_extra_ids"}, set[str]()),
    "0.16.0": (
        "0.17.0",
        set[str](),
        {
            "retention_token_range_starts",
            "retention_token_range_ends",
            "retention_token_range_priorities",
            "retention_token_range_durations_ms",
            "retention_decode_priority",
            "retention_decode_duration_ms",
        },
    ),
    "0.18.2": ("0.17.0", set[str](), set[str]()),
    "0.20.0": ("1.2.1", set[str](), {"return_num_input_tokens", "return_num_output_tokens"}),
    "0.21.0": ("1.2.1", set[str](), {"return_num_input_tokens", "return_num_output_tokens"}),
    "1.0.0": ("1.2.1", set[str](), set[str]()),
    "1.1.0": ("1.2.1", set[str](), set[str]()),
}
"""Release -> the column it is nearest to, inputs that it has beyond it, and inputs that it lacks."""
OUTPUTS_BETWEEN = {
    "0.13.0": ("0.12.0", set[str]()),
    "0.16.0": ("0.17.0", set[str]()),
    "0.18.2": ("0.17.0", set[str]()),
    "0.20.0": ("1.2.1", {"num_input_tokens", "num_output_tokens"}),
    "0.21.0": ("1.2.1", {"num_input_tokens", "num_output_tokens"}),
    "1.0.0": ("1.2.1", set[str]()),
    "1.1.0": ("1.2.1", set[str]()),
}
"""Release -> the column, and outputs that it lacks."""

Row = tuple[str, tuple[int, ...], str]
"""Type (``"*"``: the logits'), dims, and ``req``, ``opt`` or ``x``."""


def inputs(release: str) -> dict[str, Row]:
    if release in COLUMNS:
        return _column(INPUTS, release)
    column, more, less = BETWEEN[release]
    everything = {**_column(INPUTS, "1.2.1"), **_column(INPUTS, column)}
    named = (set(_column(INPUTS, column)) | more) - less
    found = {name: row for name, row in everything.items() if name in named}
    if release == "0.16.0":  # logits have the engine's type from 0.17 on
        found = {name: ("FP32" if row[0] == "*" else row[0], *row[1:]) for name, row in found.items()}
    return found


def outputs(release: str) -> dict[str, Row]:
    if release in COLUMNS:
        return _column(OUTPUTS, release)
    column, less = OUTPUTS_BETWEEN[release]
    found = {name: row for name, row in _column(OUTPUTS, column).items() if name not in less}
    if release == "0.16.0":
        found = {name: ("FP32" if row[0] == "*" else row[0], *row[1:]) for name, row in found.items()}
    return found


def _column(table: str, release: str) -> dict[str, Row]:
    found = {}
    for line in table.strip().splitlines():
        name, kind, dims, *cells = line.replace(", ", ",").replace(" *", "*").split()
        cell = cells[COLUMNS.index(release)]
        if cell != "-":
            shape = tuple(int(dim) for dim in dims.strip("[]").split(","))
            found[name] = ("*" if cell.endswith("*") else kind, shape, cell.removesuffix("*"))
    return found
